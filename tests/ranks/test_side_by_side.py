"""Commands run side by side: each in its own environment, in order, and a stop reaches all of them."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline.ranks import side_by_side
from pipeline.ranks.side_by_side import Command, Ended, SideBySide, last_words, shared_places


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A stand-in for Python that takes `-m pipeline TEXT` and runs TEXT as a shell script; returns the logs' folder."""
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/usr/bin/env bash\neval "$3"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(side_by_side.sys, "executable", str(stand_in))
    return tmp_path


def commands(folder: Path, *scripts: str) -> list[Command]:
    return [Command(f"c{number}", [script], folder / f"c{number}.log") for number, script in enumerate(scripts)]


def test_a_command_that_fails_does_not_end_the_others(programs: Path) -> None:
    failing = 'echo working; echo \'{"error": "a sentence", "exit_code": 2}\'; exit 2'
    seen: list[str] = []
    side = SideBySide([{}], ended=lambda end: seen.append(end.command.title))
    ends = side.run(commands(programs, failing, "echo done", "exit 7"))
    assert [(end.code, end.error) for end in ends] == [(2, "a sentence"), (0, ""), (7, "")]
    assert seen == ["c0", "c1", "c2"] and not side.stopped
    assert (programs / "c1.log").read_text() == "done\n"


def test_each_place_has_its_own_environment_and_runs_one_command(programs: Path) -> None:
    took: dict[str, Any] = {}
    began = SideBySide([{"WHERE": "a"}, {"WHERE": "b"}], began=lambda command: took.setdefault(command.title, None))
    began.run(commands(programs, "echo $WHERE; sleep 0.4", "echo $WHERE; sleep 0.4", "echo $WHERE"))
    said = [(programs / f"c{number}.log").read_text().strip() for number in range(3)]
    assert said[:2] == ["a", "b"] and said[2] in ("a", "b") and list(took) == ["c0", "c1", "c2"]


def test_a_stop_ends_what_runs_and_starts_nothing_more(programs: Path) -> None:
    waits = "trap 'exit 75' TERM; touch began; while true; do sleep 0.05; done"
    side = SideBySide([{}], began=lambda _: threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGTERM]).start())
    before = signal.getsignal(signal.SIGTERM)
    ends = side.run(commands(programs, f"cd {programs}; {waits}", "echo never"))
    assert [end.code for end in ends] == [75] and side.stopped
    assert not (programs / "c1.log").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_log_is_added_to_and_may_end_in_anything(programs: Path) -> None:
    log = programs / "c0.log"
    log.write_text("earlier\n")
    assert SideBySide([{}]).run(commands(programs, "echo [1]; exit 3")) == [
        Ended(Command("c0", ["echo [1]; exit 3"], log), 3)
    ]
    assert log.read_text() == "earlier\n[1]\n"
    assert last_words(programs / "none.log") == ""


def test_gpus_are_divided_and_without_them_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shared_places(2, 2, ["0", "1", "4", "5"]) == [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "4,5"},
    ]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert shared_places(2, 1, []) == [{"OMP_NUM_THREADS": "4"}] * 2
    assert shared_places(1, 2, []) == [{}]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert shared_places(2, 1, []) == [{}, {}]


def test_the_interpreter_is_this_one() -> None:
    assert side_by_side.sys.executable == sys.executable
