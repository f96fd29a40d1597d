"""What surrounds a run goes wrong: the disk is full or read-only, the clock jumps, MLflow vanishes, the loss is NaN."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.faults.bench import Bench, Row, fill, small_disk
from tests.faults.hanging import at_step
from tests.faults.kills import wait_for

# What is written when the disk is full: (module, function, call after which nothing more fits).
FULL = {
    "checkpoint in a stage": ("pipeline.training.resume", "write_synced", 1),
    "stage's checkpoint": ("pipeline.runs.finished", "write_synced", 0),
    "prediction file": ("pipeline.sequence.answers", "write_json", 0),
}


def fill_before(disk: Path, module: str, name: str, call: int) -> Callable[[], None]:
    """Sabotage: fill the disk right before that call (from 0) of a function that writes."""

    def sabotage() -> None:
        import importlib

        owner = importlib.import_module(module)
        original = getattr(owner, name)
        calls: list[int] = []

        def full(*arguments: Any, **named: Any) -> Any:
            if len(calls) == call:
                fill(disk)
            calls.append(1)
            return original(*arguments, **named)

        setattr(owner, name, full)

    return sabotage


def full_disk(bench: Bench, kinds: Sequence[str] = tuple(FULL)) -> Iterator[Row]:
    """The run's own file system is full while it writes one kind of file, and has room again at the next attempt."""
    for kind in kinds:
        module, name, call = FULL[kind]
        disk = bench.folder / "disks" / kind.replace(" ", "-")
        with small_disk(disk):
            recipe = bench.recipe(f"full-{module}", run=disk / "run")
            code, process = bench.run(recipe, fill_before(disk, module, name, call))
            (disk / "filler").unlink(missing_ok=True)
            again, _ = bench.run(recipe)
            wrong = bench.differences(recipe)
            said = process.said()
            passed = (code, again) == (1, 0) and not wrong and "could not be written" in said
            happens = "ends with a message; equal in the end once there is room"
            yield Row(f"disk full: {kind}", happens, "nothing finished", str(code), passed, said)


def full_disk_for_shards(bench: Bench) -> Row:
    """The disk is full while `prepare` writes shards."""
    disk = bench.folder / "disks" / "shards"
    with small_disk(disk, 1):
        (disk / "block").write_bytes(bytes(1024 * 1024 - 24 * 1024))
        recipe = bench.recipe("full-shards", data__prepared=str(disk / "data"))
        process = bench.start(["prepare", str(recipe)])
        code = process.wait()
        (disk / "block").unlink()
        again = bench.start(["prepare", str(recipe)]).wait()
        passed = code == 1 and again == 0 and bench.run(recipe)[0] == 0 and not bench.differences(recipe)
    return Row(
        "disk full: shard",
        "`prepare` ends with a message and goes on once there is room",
        "nothing finished",
        str(code),
        passed,
        process.said(),
    )


def full_disk_for_mlflow(bench: Bench) -> Row:
    """The disk of MLflow's database is full while a run goes on."""
    disk = bench.folder / "disks" / "mlflow"
    with small_disk(disk, 16):
        recipe = bench.recipe("full-mlflow", tracking__enabled=True, tracking__uri=f"sqlite:///{disk}/mlflow.db")
        code, process = bench.run(recipe, lambda: at_step(3, lambda: fill(disk)))
        passed = code == 0 and not bench.differences(recipe)
    said = process.said("MLflow at")
    return Row(
        "disk full: MLflow's database",
        "a warning, the run goes on",
        "numbers in MLflow, not in the run folder",
        str(code),
        passed and bool(said),
        said,
    )


def read_only(bench: Bench) -> Row:
    """The file system of the run becomes read-only before the run is started again."""
    disk = bench.folder / "disks" / "read-only"
    with small_disk(disk):
        recipe = bench.recipe("read-only", run=disk / "run")
        assert bench.run(recipe, lambda: at_step(4, lambda: os._exit(9)))[0] == 9
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code, process = bench.run(recipe)
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        again, _ = bench.run(recipe)
        passed = code == 1 and again == 0 and not bench.differences(recipe)
    return Row(
        "read-only run folder",
        "ends with a message; goes on once it can write",
        "nothing",
        str(code),
        passed,
        process.said(),
    )


def not_a_number(bench: Bench) -> Row:
    """The loss of one step is not a number; the next attempt computes it right."""
    from pipeline.prompts.model import LearnerOnLMM

    def poison() -> None:
        forward, calls = LearnerOnLMM.forward, []

        def poisoned(self: LearnerOnLMM, *arguments: Any) -> Any:
            calls.append(1)
            loss, terms = forward(self, *arguments)
            poison = float("nan") if len(calls) == 4 else 1.0
            return loss * poison, {name: term * poison for name, term in terms.items()}

        LearnerOnLMM.forward = poisoned  # type: ignore[method-assign, assignment]

    recipe = bench.recipe("nan")
    code, process = bench.run(recipe, poison)
    again, _ = bench.run(recipe)
    said = process.said()
    passed = code == 1 and "step 4 is not a finite number" in said and again == 0 and not bench.differences(recipe)
    return Row(
        "NaN loss",
        "names step and samples; goes on from the checkpoint before",
        "steps since the checkpoint",
        str(code),
        passed,
        said,
    )


def jumping_clock(bench: Bench) -> Row:
    """The clock goes back a day, then forward ten, while a stage trains."""

    def jump() -> None:
        real, start = time.time, time.time()
        time.time = lambda: real() + (-86400.0 if real() - start < 2 else 864000.0)

    recipe = bench.recipe(
        "clock", train__save_minutes=10, tracking__enabled=True, tracking__uri=f"sqlite:///{bench.folder}/clock.db"
    )
    code, process = bench.run(recipe, jump)
    passed = code == 0 and not bench.differences(recipe)
    return Row(
        "the clock jumps",
        "nothing: intervals are not taken from the time of day",
        "nothing",
        str(code),
        passed,
        process.said(),
    )


def vanishing_mlflow(bench: Bench) -> Row:
    """An MLflow server goes away in the middle of a stage and comes back before the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = bench.folder / "server"
    store.mkdir()
    recipe = bench.recipe("mlflow", train__steps=60, tracking__enabled=True, tracking__uri=f"http://127.0.0.1:{port}")
    whole = bench.recipe("mlflow-whole", train__steps=60)
    assert bench.run(whole)[0] == 0
    with _mlflow(store, port):
        process = bench.start(["run", str(recipe)], lambda: _hurry(store / "gone"))
        wait_for(bench.stage(recipe, 1, unfinished=True) / "metrics.jsonl")
    (store / "gone").touch()
    time.sleep(2)
    with _mlflow(store, port):
        (store / "gone").unlink()
        code = process.wait()
        from mlflow import MlflowClient

        client = MlflowClient(f"http://127.0.0.1:{port}")
        runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        # Step 0 is not a step of training: there the stage's model has its final loss.
        history = [client.get_metric_history(run.info.run_id, "loss") for run in runs]
        points = max(len({metric.step for metric in part} - {0}) for part in history)
    passed = code == 0 and points == 60 and not bench.differences(recipe, whole)
    happens = f"a warning, training goes on; {points} of 60 losses have arrived at the end"
    said = process.said("MLflow at")
    return Row("MLflow server vanishes and comes back", happens, "nothing", str(code), passed, said)


def _hurry(gone: Path) -> None:
    """Sabotage: ask the store again soon, and train slowly enough for it to be away in the meantime."""
    import pipeline.tracking.mlflow_tracker

    pipeline.tracking.mlflow_tracker.RETRY_AFTER_S = 1.0
    at_step(30, lambda: _until(lambda: gone.exists()))
    at_step(40, lambda: _until(lambda: not gone.exists()))


def _until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.1)


@contextlib.contextmanager
def _mlflow(store: Path, port: int) -> Iterator[None]:
    places = ["--backend-store-uri", f"sqlite:///{store}/mlflow.db", "--artifacts-destination", str(store / "files")]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *places]
    with (store / "log").open("a") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 15)
        server.wait()
