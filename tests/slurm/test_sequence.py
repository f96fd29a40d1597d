"""A sequence on two nodes: ended, stopped, killed, cancelled, a node gone; as several jobs; its data by arrays."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from data_prep.prepare import prepare
from tests import tiny, tiny_clip
from tests.e2e.conftest import recipe_on
from tests.slurm.conftest import Cluster, Job

pytestmark = pytest.mark.slurm

TASKS, STEPS = 2, 20
ACROSS_WORLD_SIZES = 1e-6
FAST_S = 120  # Slurm gives the other ranks 10 s here; the rest is for a machine that does other things as well

Measured = Callable[[str, float], None]


@dataclass(frozen=True)
class Run:
    """A run of the small sequence in a folder of its own."""

    recipe: Path
    path: Path

    @property
    def second_stage(self) -> Path:
        """metrics.jsonl of the second stage while it is trained."""
        return self.path / "stages" / "02-T1.unfinished" / "metrics.jsonl"

    def in_second_stage(self, steps: int = 3) -> bool:
        return len(lines(self.second_stage)) >= steps

    def values(self) -> list[dict[str, torch.Tensor]]:
        """Prompt sets and heads of all stages."""
        return [
            load_file(self.path / "stages" / f"{number + 1:02d}-T{number}" / "prompts.safetensors")
            for number in range(TASKS)
        ]

    def losses(self) -> list[list[tuple[int, float]]]:
        """(step, loss) of every line of every stage."""
        folders = [self.path / "stages" / f"{number + 1:02d}-T{number}" for number in range(TASKS)]
        return [[(line["step"], line["loss"]) for line in lines(folder / "metrics.jsonl")] for folder in folders]

    def accuracy(self) -> Any:
        return json.loads((self.path / "matrix.json").read_text("utf-8"))["accuracy"]


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file that may be growing."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("slurm")
    tiny.save_llava(root / "llava", tied=True)
    tiny_clip.save_clip(root / "clip")
    for number in range(TASKS):
        tiny_clip.save_coin(root / "coin", f"T{number}", train=6, test=4)
    prepare(recipe_on(root, root / "unused", TASKS), progress=False)
    return root


@pytest.fixture(scope="module")
def new_run(root: Path) -> Callable[[str], Run]:
    """Makes runs of the same recipe in folders of their own."""

    def make(name: str) -> Run:
        recipe = recipe_on(
            root,
            root / name,
            TASKS,
            train__steps=STEPS,
            train__deepspeed="ds_configs/zero3.json",
            train__schedule="cosine",
            train__save_steps=2,
            evaluate__zero_shot=False,
        )
        recipe.dump_yaml(root / f"{name}.yaml")
        return Run(root / f"{name}.yaml", recipe.run_path)

    return make


@pytest.fixture(scope="module")
def whole(cluster: Cluster, root: Path, new_run: Callable[[str], Run], measured: Measured) -> Run:
    """The sequence on two nodes without any disturbance."""
    run = new_run("whole")
    job = cluster.submit(root / "whole.out", "--nodes=2", "--", str(run.recipe))
    measured("first step after submission", job.until(lambda: first_step(run), "in the first stage"))
    measured("the sequence on two nodes, from its first step", job.ended())
    return run


def first_step(run: Run) -> bool:
    return any(lines(path) for path in (run.path / "stages").glob("*/metrics.jsonl"))


def same_result(found: Run, expected: Run, tolerance: float = 0.0) -> None:
    """Prompt sets, heads and scores are equal, and so is the loss of every step; a tolerance is relative above 1."""
    for number, (one, two) in enumerate(zip(found.values(), expected.values(), strict=True)):
        assert one.keys() == two.keys()
        for name, value in one.items():
            worst = float((value - two[name]).abs().max())
            assert worst <= tolerance, f"stage {number + 1}: {name} differs by {worst}"
    for one_stage, two_stage in zip(found.losses(), expected.losses(), strict=True):
        assert [step for step, _ in one_stage] == [step for step, _ in two_stage] == list(range(1, STEPS + 1))
        worst = max(abs(a[1] - b[1]) / max(1.0, b[1]) for a, b in zip(one_stage, two_stage, strict=True))
        assert worst <= tolerance, f"losses differ by {worst}"
    assert found.accuracy() == expected.accuracy()


def test_a_sequence_runs_to_its_end_on_two_nodes(whole: Run) -> None:
    state = json.loads((whole.path / "run.json").read_text("utf-8"))
    assert (state["status"], state["world_size"]) == ("done", 2)
    assert len(whole.losses()[1]) == STEPS


def test_a_job_told_to_stop_saves_is_queued_again_and_ends_with_the_same_result(
    cluster: Cluster, root: Path, new_run: Callable[[str], Run], whole: Run, measured: Measured
) -> None:
    run = new_run("stopped")
    job = cluster.submit(root / "stopped.out", "--nodes=2", "--", str(run.recipe))
    job.until(run.in_second_stage, "in the second stage")
    cluster.call("scancel", "--signal=USR1", str(job))
    measured("requeue after the signal", job.until(lambda: job.field("Restarts") == "1", "queued again", 60))
    status = json.loads((run.path / "run.json").read_text("utf-8"))["status"]
    done = len(lines(run.second_stage))
    assert (status, done < STEPS) == ("stopped", True), job.text()
    written = run.second_stage.stat().st_mtime
    job.until(lambda: later_step(run, written), "stepping again")
    measured(f"first step after the requeue (after step {done})", time.time() - written)
    job.ended()
    assert "the job is queued again" in job.text()
    assert f"resuming after step {done}" in job.text()
    same_result(run, whole)


def test_a_job_near_its_time_limit_saves_is_queued_again_and_ends_with_the_same_result(
    cluster: Cluster, root: Path, new_run: Callable[[str], Run], whole: Run, measured: Measured
) -> None:
    """By Slurm's own signal, from the batch shell through srun to the ranks; Slurm sends it half a minute early."""
    run = new_run("limited")
    limit = ("--nodes=2", "--time=2", "--signal=B:USR1@30")
    job = cluster.submit(root / "limited.out", *limit, "--", str(run.recipe))
    job.until(run.in_second_stage, "in the second stage")
    rank = rank_process(job, 1)
    os.kill(rank, signal.SIGSTOP)  # so that the stage does not end before the time does
    try:
        job.until(lambda: waits_for(rank, signal.SIGUSR1), "told to stop", 150)
    finally:
        os.kill(rank, signal.SIGCONT)
    measured("requeue after the time limit's signal", job.until(lambda: job.field("Restarts") != "0", "queued", 60))
    job.ended()
    assert "the job is queued again" in job.text()
    assert "resuming after step" in job.text()
    same_result(run, whole)


def waits_for(process: int, number: int) -> bool:
    """Whether a signal was sent to a process that is stopped."""
    status = Path(f"/proc/{process}/status").read_text()
    masks = [line.split()[1] for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


def later_step(run: Run, since: float) -> bool:
    path = run.second_stage if run.second_stage.exists() else run.path / "stages" / "02-T1" / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > since and len(lines(path)) > 0


def test_a_killed_rank_ends_the_job_and_the_next_job_ends_with_the_same_result(
    cluster: Cluster, root: Path, new_run: Callable[[str], Run], whole: Run, measured: Measured
) -> None:
    run = new_run("killed")
    job = cluster.submit(root / "killed.out", "--nodes=2", "--", str(run.recipe))
    job.until(run.in_second_stage, "in the second stage")
    os.kill(rank_process(job, 1), signal.SIGKILL)
    took = job.ended("FAILED", limit_s=FAST_S)
    measured("end of a job after one of its ranks was killed", took)
    assert job.field("Restarts") == "0"
    again = cluster.submit(root / "killed-again.out", "--nodes=2", "--", str(run.recipe))
    again.ended()
    assert "resuming after step" in again.text()
    same_result(run, whole)


def rank_process(job: Job, rank: int) -> int:
    """Process id of one rank of a job."""
    wanted = {"SLURM_JOB_ID": str(job), "SLURM_PROCID": str(rank), "SLURM_STEP_ID": "0"}
    for process in psutil.process_iter():
        try:
            if process.name() != "slurmstepd" and wanted.items() <= process.environ().items():
                return process.pid
        except psutil.Error:
            continue
    raise AssertionError(f"rank {rank} of job {job} is not running")


def test_a_cancelled_job_stays_cancelled_and_goes_on_with_one_node_instead_of_two(
    cluster: Cluster, root: Path, new_run: Callable[[str], Run], whole: Run
) -> None:
    run = new_run("cancelled")
    job = cluster.submit(root / "cancelled.out", "--nodes=2", "--", str(run.recipe))
    job.until(run.in_second_stage, "in the second stage")
    cluster.call("scancel", str(job))
    job.ended("CANCELLED")
    assert json.loads((run.path / "run.json").read_text("utf-8"))["status"] == "stopped", job.text()
    again = cluster.submit(root / "cancelled-again.out", "--nodes=1", "--", str(run.recipe))
    again.ended()
    assert "resuming after step" in again.text()
    assert json.loads((run.path / "run.json").read_text("utf-8"))["world_size"] == 1
    same_result(run, whole, ACROSS_WORLD_SIZES)


def test_a_chain_has_a_job_for_every_stage_and_ends_with_the_same_result(
    cluster: Cluster, root: Path, new_run: Callable[[str], Run], whole: Run
) -> None:
    run = new_run("chained")
    output = root / "chained-%j.out"
    jobs = cluster.several(
        output, "slurm/run_sequence.sh", "--chain", str(run.recipe), SBATCH_OPTIONS=f"--nodes=2 --output={output}"
    )
    assert len(jobs) == TASKS
    for job in jobs:
        job.ended()
    assert "T1" not in "".join(line for line in jobs[0].text().splitlines() if " stage " in line)
    same_result(run, whole)


def test_a_job_trains_and_another_one_evaluates(
    cluster: Cluster, root: Path, new_run: Callable[[str], Run], whole: Run
) -> None:
    run = new_run("trained")
    cluster.submit(root / "trained.out", "--nodes=2", "--", "--train", str(run.recipe)).ended()
    assert not list((run.path / "eval").glob("after-*/*.jsonl"))
    cluster.submit(root / "evaluated.out", "--nodes=1", "--", "--evaluate", str(run.path)).ended()
    assert run.accuracy() == whole.accuracy()


def test_the_embedded_default_is_prepared_and_run_by_one_job(cluster: Cluster, root: Path, measured: Measured) -> None:
    """As the first line of docs/cluster.md has it, cut down to two small tasks and a few steps."""
    tasks = ", ".join(f"{{name: {n}, metric: exact, limit_train: 64, limit_test: 8}}" for n in ("Colours", "Digits"))
    changes = [
        f"data.tasks=[{tasks}]",
        f"data.root={root / 'nano-coin'}",
        f"data.prepared={root / 'nano'}",
        f"run_dir={root / 'embedded'}",
        "train.steps=4",
        "train.log_every=1",
        "evaluate.zero_shot=false",
    ]
    overrides = [part for change in changes for part in ("--set", change)]
    job = cluster.submit(root / "embedded.out", "--nodes=2", "--", "--prepare", "nano", *overrides)
    measured("the embedded default in short, data included", job.ended())
    state = json.loads((root / "embedded" / "run.json").read_text("utf-8"))
    assert (state["status"], state["world_size"]) == ("done", 2), job.text()
    matrix = json.loads((root / "embedded" / "matrix.json").read_text("utf-8"))
    assert [len(row) for row in matrix["accuracy"]] == [2, 2]
    assert (root / "embedded" / "report.html").is_file()


def test_arrays_of_jobs_prepare_what_one_process_prepares(cluster: Cluster, root: Path) -> None:
    recipe = recipe_on(root, root / "unused", TASKS)
    again = recipe.model_copy(update={"data": recipe.data.model_copy(update={"prepared": str(root / "again")})})
    again.dump_yaml(root / "again.yaml")
    output = root / "prepared-%j.out"
    jobs = cluster.several(
        output, "slurm/prepare_array.sh", "--tasks", "2", str(root / "again.yaml"), PREPARE_OPTIONS=f"--output={output}"
    )
    assert len(jobs) == 4
    jobs[-1].ended()
    shards = sorted(path.relative_to(root / "data") for path in (root / "data").rglob("*.tar"))
    assert len(shards) == 2 * TASKS
    for shard in shards:
        assert (root / "again" / shard).read_bytes() == (root / "data" / shard).read_bytes()
        one, two = (load_file(root / name / shard.parent / "keys.safetensors") for name in ("again", "data"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_job_whose_node_fails_is_queued_again_and_ends_with_the_same_result(
    cluster: Cluster, root: Path, new_run: Callable[[str], Run], whole: Run
) -> None:
    run = new_run("node")
    job = cluster.submit(root / "node.out", "--nodes=2", "--", str(run.recipe))
    job.until(run.in_second_stage, "in the second stage")
    cluster.call("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=trial")
    job.until(lambda: job.field("Restarts") == "1", "queued again", 60)
    if "down" in cluster.call("sinfo", "--noheader", "--nodes=n2", "--format=%T"):  # else it has reported back itself
        cluster.call("scontrol", "update", "NodeName=n2", "State=RESUME")
    job.ended()
    assert "resuming after step" in job.text()
    same_result(run, whole)
