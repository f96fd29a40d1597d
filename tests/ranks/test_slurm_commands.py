"""The command that a verb advises to run next is a job where there is Slurm."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipeline.config.paths import PROJECT
from pipeline.ranks.slurm import has_slurm, next_command, resources

JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "64",
    "SLURM_JOB_PARTITION": "gpu",
    "SLURM_JOB_START_TIME": "1000",
    "SLURM_JOB_END_TIME": "87401",
}
CPUS = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_ON_NODE": "16"}
ASKED = ("runs/a b", "--image", "FILE")


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a login node, in the root of the repository."""
    (tmp_path / "sbatch").touch(mode=0o755)
    monkeypatch.chdir(PROJECT)
    return {"PATH": str(tmp_path)}


def test_without_slurm_it_is_the_plain_command() -> None:
    nowhere = {"PATH": "/nowhere"}
    assert not has_slurm(nowhere)
    assert next_command("run", "nano", env=nowhere) == "python -m pipeline run nano"


def test_on_a_login_node_the_script_is_submitted_with_options_of_the_users(login: dict[str, str]) -> None:
    assert has_slurm(login)
    script = "slurm/run_sequence.sh"
    assert next_command("run", "nano", env=login) == f"sbatch OPTIONS {script} nano"
    assert next_command("train", "nano", env=login) == f"sbatch OPTIONS {script} --train nano"
    assert next_command("evaluate", "runs/a b", env=login) == f"sbatch OPTIONS {script} --evaluate 'runs/a b'"
    asked = "python -m pipeline predict 'runs/a b' --image FILE"
    assert next_command("predict", *ASKED, env=login) == f"srun --nodes=1 --ntasks=1 --gpus-per-node=1 {asked}"
    added = shlex.split(next_command("add", "runs/a b", "Mine", env=login))
    assert added[:-1] == ["sbatch", "--nodes=1", "--ntasks=1", "OPTIONS", "--wrap"]
    assert shlex.split(added[-1]) == ["python", "-m", "pipeline", "add", "runs/a b", "Mine"]


def test_in_a_job_the_next_one_has_its_resources(login: dict[str, str]) -> None:
    options = "--partition=gpu --gpus-per-node=8 --cpus-per-gpu=8 --time=1441"
    assert resources(JOB) == f"--nodes=2 {options}"
    assert next_command("evaluate", "runs/a", env=JOB) == (
        f"sbatch --nodes=2 {options} slurm/run_sequence.sh --evaluate runs/a"
    )
    assert next_command("add", "runs/a", "B", env=JOB).startswith(f"sbatch --nodes=1 --ntasks=1 {options} --wrap ")
    assert resources({**JOB, "SLURM_GPUS_ON_NODE": "a100:4"}).split()[2:4] == ["--gpus-per-node=4", "--cpus-per-gpu=16"]


def test_a_job_on_cpus_has_tasks_in_place_of_gpus(login: dict[str, str]) -> None:
    assert resources(CPUS) == "--nodes=2 --ntasks-per-node=4 --cpus-per-task=4"
    assert next_command("predict", *ASKED, env=CPUS).startswith("srun --nodes=1 --ntasks=1 python -m pipeline predict ")
    assert "--ntasks=1 --cpus-per-task=16 --wrap" in next_command("add", "runs/a", "B", env=CPUS)


def test_where_the_script_is_not_the_command_stays_one_that_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert next_command("run", "nano", env=JOB) == "python -m pipeline run nano"
