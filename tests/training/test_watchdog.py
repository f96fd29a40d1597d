"""What the watchdog reads from stacks, and that it leaves a job alone that makes progress."""

from __future__ import annotations

import datetime
import faulthandler
import inspect
import os
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed

from pipeline.ranks import watchdog
from pipeline.ranks.watchdog import Watchdog, collective_timeout, where
from pipeline.ranks.world import World
from pipeline.sequence.run import run_sequence
from tests.e2e.conftest import recipe_on

ALONE = World(0, 1, 0, torch.device("cpu"))


class Ended(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of processes that the watchdog would have ended."""
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    monkeypatch.setattr(watchdog, "SLOW_S", 0.2)
    monkeypatch.setattr(watchdog, "GRACE_S", 5.0)
    return codes


def test_a_job_without_progress_is_ended_with_the_stacks(ends: list[int], capfd: pytest.CaptureFixture[str]) -> None:
    with Watchdog(ALONE, 0.2).watching() as dog:
        dog.beat("step 3 of 10")
        until = time.monotonic() + 60
        while not ends and time.monotonic() < until:
            time.sleep(0.05)
    assert ends == [1]
    said = capfd.readouterr().err
    assert "No rank has made progress for" in said
    assert "step 3 of 10: is in no collective but at tests/training/test_watchdog.py" in said
    assert "thread MainThread" in said


def test_progress_keeps_a_job_alive(ends: list[int]) -> None:
    with Watchdog(ALONE, 2.0).watching() as dog:
        for step in range(40):
            dog.beat(f"step {step}")
            time.sleep(0.1)
    assert not ends


class CountingStore:
    """A store in this process that counts what it is asked."""

    def __init__(self) -> None:
        self.store, self.asked = torch.distributed.HashStore(), 0

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        return getattr(self.store, name)


def places_told(size: int, silent: set[int], store: CountingStore) -> dict[int, dict[int, str]]:
    """What each rank that answers knows of all when all have given up at about the same time."""
    found: dict[int, dict[int, str]] = {rank: {rank: f"place {rank}"} for rank in range(size) if rank not in silent}

    def end(rank: int) -> None:
        dog = Watchdog(World(rank, size, 0, torch.device("cpu")), None)
        dog._store = store
        dog._share("hung", f"place {rank}", found[rank])

    threads = [threading.Thread(target=end, args=(rank,)) for rank in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_five_hundred_ranks_learn_where_all_are_with_few_questions() -> None:
    store, size = CountingStore(), 512
    everywhere = {rank: f"place {rank}" for rank in range(size)}
    assert all(known == everywhere for known in places_told(size, set(), store).values())
    assert store.asked < 20 * size  # were each to ask for each, 512 * 512 * 2


@pytest.mark.parametrize("silent", [{3}, {0}], ids=["another", "rank 0"])
def test_what_is_known_goes_to_all_where_a_rank_does_not_answer(
    silent: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "GRACE_S", 1.0)
    expected = {rank: f"place {rank}" for rank in range(6) if rank not in silent}
    assert all(known == expected for known in places_told(6, silent, CountingStore()).values())


def test_what_begins_after_something_slow_has_its_own_time(ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the progress of all ranks has not been added up again."""
    monkeypatch.setattr(watchdog, "SLOW_S", 60.0)
    monkeypatch.setattr(Watchdog, "_count", lambda dog: dog._ended.wait())
    with Watchdog(ALONE, 1.5).watching() as dog:
        dog.beat("loading", slow=True)
        time.sleep(2.0)
        dog.beat("step 2")
        time.sleep(0.5)
        assert not ends
        wait_for_end(ends)


def test_a_job_that_was_suspended_gets_its_time_back(ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    jump, timers, real = [0.0], list[float](), time.monotonic
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: real() + jump[0])
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, **_: timers.append(seconds))
    with Watchdog(ALONE, 1.5).watching() as dog:
        dog.beat("step 2")
        time.sleep(0.5)
        jump[0] = 3600.0
        time.sleep(0.5)
        assert not ends
        wait_for_end(ends)
    assert min(timers) >= collective_timeout(1.5).total_seconds()


def wait_for_end(ends: list[int]) -> None:
    """It is no more than delayed."""
    until = time.monotonic() + 60
    while not ends and time.monotonic() < until:
        time.sleep(0.05)
    assert ends == [1]


@pytest.mark.parametrize("limit_s", [None, 900.0, 7200.0])
def test_collectives_wait_longer_than_the_watchdog(
    limit_s: float | None, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the groups that DeepSpeed makes too, which have torch's default."""
    c10d: Any = torch.distributed.distributed_c10d
    asked = list[float]()

    def join(backend: str, timeout: datetime.timedelta) -> None:
        asked.extend(found.total_seconds() for found in (timeout, *map(c10d._get_default_timeout, ("gloo", "nccl"))))
        raise Ended

    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(c10d, name, datetime.timedelta(minutes=10))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    with pytest.raises(Ended):
        run_sequence(recipe_on(prepared, tmp_path, 1, train__watchdog_s=limit_s))
    assert asked == [max(limit_s or 0.0, watchdog.SLOW_S) + watchdog.MARGIN_S] * 3


def test_without_a_limit_nothing_is_watched(ends: list[int]) -> None:
    before = threading.active_count()
    with Watchdog(ALONE, None).watching():
        assert threading.active_count() == before
    assert not ends


def test_the_collective_and_the_line_that_called_it_are_named() -> None:
    names: dict[str, Any] = {}
    source = "def all_gather(ask):\n    return ask()\n"  # stands for the function of this name, which would wait
    exec(compile(source, torch.distributed.distributed_c10d.__file__, "exec"), names)

    def gather_losses() -> FrameType:
        return names["all_gather"](lambda: inspect.currentframe())

    assert where({1: gather_losses()}, 1).startswith("waits in all_gather, called at tests/training/test_watchdog.py:")
    assert "in gather_losses" in where({1: gather_losses()}, 1)
