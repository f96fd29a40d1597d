"""What slurm/submit.sh checks before it submits, with stand-ins for Slurm's commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.slurm.test_script import Shell

RUN = "slurm/run_sequence.sh"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_a_recipe_is_checked_for_the_ranks_of_the_job_and_then_submitted_as_it_was_written(shell: Shell) -> None:
    words = ["--nodes=2", "--gpus-per-node=a100:8", "--time=1", RUN, "--train", "nano", "--set", "seed=1", "--json"]
    done = shell.submit(*words, "--skip-bad", "3", GPU_MEMORY="80", RUN="echo table")
    assert done.returncode == 0, done.stderr
    (check,) = shell.calls("python-stand-in")
    assert check == "-m pipeline check nano --set seed=1 --set data.skip_bad=3 --ranks 16 --gpu-memory 80"
    assert shell.calls("sbatch") == [" ".join([*words, "--skip-bad", "3"])]
    assert (done.stdout, done.stderr) == ("101\n", "table\n"), "what sbatch prints may be read by a script"


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        (["-N", "2", "--gpus-per-node", "4"], "--ranks 8"),
        (["-N3", "--gpus-per-node=8", "--ntasks-per-node=2"], "--ranks 6"),
        (["--gpus-per-node=4"], "--ranks 4"),
        (["--nodes=1-2", "--gpus-per-node=4"], ""),
        (["--nodes=2"], ""),
        ([], ""),
    ],
)
def test_ranks_are_read_from_the_options_where_they_say_them(shell: Shell, options: list[str], ranks: str) -> None:
    assert shell.submit(*options, f"./{RUN}", "nano").returncode == 0
    assert shell.calls("python-stand-in") == [f"-m pipeline check nano {ranks}".strip()]
    assert len(shell.calls("sbatch")) == 1


def test_data_that_the_job_prepares_is_no_problem_before_it(shell: Shell) -> None:
    shell.submit(RUN, "--prepare", "nano")
    assert shell.calls("python-stand-in") == ["-m pipeline check nano --set data.prepare_first=true"]


def test_a_wrong_recipe_is_not_submitted(shell: Shell) -> None:
    for call in ((RUN, "nanoo"), (RUN, "nano", "--set", "train.stepss=1")):
        done = shell.submit(*call, PYTHON=sys.executable)
        assert done.returncode == 2 and "Did you mean" in done.stderr
        assert done.stderr.endswith("nothing was submitted.\n")
    done = shell("--submit", "nanoo", PYTHON=sys.executable)
    assert done.returncode == 2 and "Did you mean 'nano'?" in done.stderr
    done = shell.prepare("nanoo", PYTHON=sys.executable)
    assert done.returncode == 2 and "Did you mean 'nano'?" in done.stderr
    assert shell.calls("sbatch") == []


def test_a_recipe_that_is_right_and_prepared_by_its_job_is_submitted(shell: Shell, tmp_path: Path) -> None:
    where = ["--set", f"data.prepared={tmp_path}/data", "--set", f"run_dir={tmp_path}/run"]
    done = shell.submit("--nodes=1", RUN, "--prepare", "nano", *where, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert len(shell.calls("sbatch")) == 1


def test_a_python_that_cannot_check_is_named_with_the_way_round(shell: Shell) -> None:
    done = shell.submit(RUN, "nano", RUN="exit 1")
    assert (done.returncode, shell.calls("sbatch")) == (1, [])
    assert "cannot be checked with python-stand-in" in done.stderr and "LOGIN_PYTHON" in done.stderr


def test_a_run_that_is_evaluated_has_to_be_there(shell: Shell, tmp_path: Path) -> None:
    assert shell.submit(RUN, "--evaluate", str(tmp_path)).returncode == 2
    assert shell.calls("sbatch") == []
    (tmp_path / "config.yaml").touch()
    assert shell.submit(RUN, "--evaluate", str(tmp_path)).returncode == 0
    assert len(shell.calls("sbatch")) == 1 and not shell.calls("python-stand-in")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--nodes=2", "nano"), "expected sbatch's options, then slurm/run_sequence.sh and a recipe"),
        ((RUN, "--chain", "nano"), "--chain submits by itself"),
        ((RUN, "nano", "--set"), "--set needs a value"),
    ],
)
def test_a_submission_that_cannot_be_meant_is_refused(shell: Shell, words: tuple[str, ...], said: str) -> None:
    done = shell.submit(*words)
    assert done.returncode == 2 and said in done.stderr
    assert shell.calls("sbatch") == []


def test_the_embedded_default_is_submitted_unchecked(shell: Shell) -> None:
    assert shell.submit("--nodes=2", RUN).returncode == 0
    assert shell.calls("sbatch") == [f"--nodes=2 {RUN}"] and not shell.calls("python-stand-in")
