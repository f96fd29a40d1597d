"""One writer per run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.errors import Interrupted, UserError
from pipeline.ranks import world as distributed
from pipeline.ranks.remote_error import RemoteError
from pipeline.ranks.shutdown import StopFlag
from pipeline.ranks.world import World, on_main
from pipeline.runs import lock as run_lock
from pipeline.runs.claim import claim_run
from pipeline.runs.claimed import claimed
from pipeline.runs.layout import CONFIG, LOCK
from pipeline.runs.lock import locked
from tests.processes import PROJECT

HOLDER = """
import os, sys, time
from pathlib import Path
from pipeline.runs.lock import locked
with locked(Path(sys.argv[1])):
    worker = os.fork() if len(sys.argv) > 2 else 1
    if worker:
        print(worker, flush=True)
    time.sleep(120)
"""


@contextmanager
def holder(run: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the lock of a run, and the id of its worker if it was asked for one."""
    command = [sys.executable, "-c", HOLDER, str(run), *arguments]
    process = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        yield process, worker
    finally:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_S", 0.5)
    monkeypatch.setattr(run_lock, "WAIT_ELSEWHERE_S", 1.5)


def test_a_run_that_another_process_writes_to_is_refused_with_its_name(tmp_path: Path) -> None:
    with holder(tmp_path) as (process, _), pytest.raises(UserError) as refused, locked(tmp_path):
        pass
    assert f"in use by process {process.pid} on {os.uname().nodename}" in str(refused.value)
    assert f"remove {tmp_path / LOCK}" in str(refused.value)
    with locked(tmp_path):  # killed: its lock went with it
        pass


def test_the_lock_of_a_killed_rank_does_not_live_on_in_its_worker(tmp_path: Path) -> None:
    with holder(tmp_path, "with a worker") as (process, worker):
        process.kill()
        process.wait()
        try:
            with locked(tmp_path):
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with caplog.at_level(logging.WARNING, "pipeline"), locked(tmp_path):
        pass
    assert "knows no locks" in caplog.text


def on_another_machine(run: Path) -> None:
    told = json.loads((run / LOCK).read_text())
    (run / LOCK).write_text(json.dumps({**told, "host": "node7", "job": "41"}))


def test_a_holder_on_another_machine_may_have_failed_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Waited for longer, and the job is to be queued again: exit code 75 and not 2."""
    with holder(tmp_path) as (process, _), caplog.at_level(logging.WARNING, "pipeline"):
        on_another_machine(tmp_path)
        said = f"in use by process {process.pid} on node7 .Slurm job 41.*Then run the same command again"
        with pytest.raises(Interrupted, match=said), locked(tmp_path):
            pass
    assert [record.getMessage().startswith("run folder in use by") for record in caplog.records] == [True]


def test_its_lock_is_taken_when_the_file_server_gives_it_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_S", 0.0)
    monkeypatch.setattr(run_lock, "WAIT_ELSEWHERE_S", 600.0)
    with holder(tmp_path) as (process, _):
        on_another_machine(tmp_path)
        monkeypatch.setattr(run_lock.log, "warning", lambda *_: process.kill())
        with locked(tmp_path):
            assert process.wait(20)


def test_waiting_for_a_lock_can_be_stopped(tmp_path: Path) -> None:
    told, said = StopFlag(requested=True), "Stopped while waiting for process"
    with holder(tmp_path), pytest.raises(Interrupted, match=said), locked(tmp_path, told):
        pass


def test_what_ends_rank_0_resumably_ends_every_rank_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is not the first learns of it through the broadcast."""
    other, told = World(1, 2, 0, torch.device("cpu")), RemoteError.of(Interrupted("in use elsewhere"), rank=0)
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: (None, told))
    with pytest.raises(Interrupted, match="in use elsewhere"):
        on_main(other, lambda: None)


# ---------------------------------------------------------------------- starts that were refused


def started(recipe: Recipe) -> None:
    with claimed(recipe, World(0, 1, 0, torch.device("cpu"))):
        pass


def nano(tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe("nano", [f"run_dir={tmp_path / 'run'}", *overrides])


def test_a_folder_whose_starts_were_all_refused_is_taken_by_another_recipe(tmp_path: Path) -> None:
    started(nano(tmp_path))
    other = nano(tmp_path, "data.too_long=skip")
    assert (claim_run(other) / CONFIG).read_text().count("too_long: refuse") == 1  # nothing is written without the lock
    started(other)
    # What a recipe compares is no part of its runs.
    assert load_recipe(tmp_path / "run" / CONFIG).model_dump() == other.model_dump()


@pytest.mark.parametrize("there", ["stages", "run.json", "lost+found"])
def test_a_folder_in_which_something_was_begun_keeps_its_recipe(tmp_path: Path, there: str) -> None:
    started(nano(tmp_path))
    (tmp_path / "run" / there).mkdir()
    with pytest.raises(UserError, match=r"belongs to another recipe \(data.too_long: refuse there, skip now\)"):
        started(nano(tmp_path, "data.too_long=skip"))


def test_a_recipe_that_somebody_put_into_a_folder_is_not_written_over(tmp_path: Path) -> None:
    claim_run(nano(tmp_path))
    assert not (tmp_path / "run" / LOCK).exists()
    with pytest.raises(UserError, match="belongs to another recipe"):
        started(nano(tmp_path, "data.too_long=skip"))


def test_what_was_begun_while_the_lock_was_waited_for_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(nano(tmp_path))
    acquire = run_lock.FileLock.acquire

    def other_process_first(lock: run_lock.FileLock) -> bool:
        (tmp_path / "run" / "run.json").write_text("{}")
        return acquire(lock)

    monkeypatch.setattr(run_lock.FileLock, "acquire", other_process_first)
    with pytest.raises(UserError, match="belongs to another recipe"):
        started(nano(tmp_path, "data.too_long=skip"))
    assert "too_long: refuse" in (tmp_path / "run" / CONFIG).read_text()
