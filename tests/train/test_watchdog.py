"""What the watchdog reads from stacks, and that it leaves a job alone that makes progress."""

from __future__ import annotations

import inspect
import os
import threading
import time
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed

from pipeline import watchdog
from pipeline.distributed import World
from pipeline.watchdog import Watchdog, where

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
    assert "step 3 of 10: is in no collective but at tests/train/test_watchdog.py" in said
    assert "thread MainThread" in said


def test_progress_keeps_a_job_alive(ends: list[int]) -> None:
    with Watchdog(ALONE, 2.0).watching() as dog:
        for step in range(40):
            dog.beat(f"step {step}")
            time.sleep(0.1)
    assert not ends


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

    assert where({1: gather_losses()}, 1).startswith("waits in all_gather, called at tests/train/test_watchdog.py:")
    assert "in gather_losses" in where({1: gather_losses()}, 1)
