"""What a comparison says of a run in progress follows from the log that the run writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.sequence.follow import EVERY_S, LOOK_S, FollowedLog


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def added(log: Path, *lines: str, end: str = "\n") -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + end)


def news(followed: FollowedLog, clock: Clock, after: float) -> list[str]:
    clock.seconds += after
    return followed.news()


def test_the_scores_after_a_stage_are_said_when_they_are_written(tmp_path: Path, clock: Clock) -> None:
    log = tmp_path / "a.log"
    added(log, "09:00:00 after stage 1 (A): A 12.0")
    followed = FollowedLog(log, clock)
    assert news(followed, clock, LOOK_S) == [], "what an earlier call wrote is no news"
    added(log, "09:00:01 zero-shot: A 3.0, B 4.0", "09:00:02 stage 1/2 A: 6 samples, 20 steps", "a library's line")
    assert news(followed, clock, LOOK_S) == ["zero-shot: A 3.0, B 4.0"]
    added(log, "09:00:09 after stage 1 (A): A 50.0", "09:00:09 after stage 2 (B): A 5", end="")
    assert news(followed, clock, LOOK_S) == ["after stage 1 (A): A 50.0"], "a line is read when it is complete"
    added(log, "0.0, B 60.0")
    assert news(followed, clock, LOOK_S) == ["after stage 2 (B): A 50.0, B 60.0"]


def test_inside_a_stage_the_newest_step_is_said_once_a_minute(tmp_path: Path, clock: Clock) -> None:
    log = tmp_path / "a.log"
    followed = FollowedLog(log, clock)
    assert news(followed, clock, EVERY_S) == [], "there is no log yet"
    added(log, "09:00:00 stage 2/6 Count: 304 samples, 150 steps", "09:00:30 step 10/150  loss 2.0")
    assert news(followed, clock, EVERY_S / 2) == ["stage 2/6 Count, step 10/150  loss 2.0"]
    added(log, "09:01:00 step 20/150  loss 1.5")
    assert news(followed, clock, EVERY_S / 2) == []
    added(log, "09:01:30 step 30/150  loss 1.0")
    assert news(followed, clock, EVERY_S / 2) == ["stage 2/6 Count, step 30/150  loss 1.0"]
    assert news(followed, clock, 2 * EVERY_S) == [], "nothing new was written"


def test_a_log_is_looked_at_once_a_second(tmp_path: Path, clock: Clock) -> None:
    log = tmp_path / "a.log"
    followed = FollowedLog(log, clock)
    added(log, "09:00:00 after stage 1 (A): A 50.0")
    assert news(followed, clock, LOOK_S / 2) == []
    assert news(followed, clock, LOOK_S / 2) == ["after stage 1 (A): A 50.0"]
    added(log, "09:00:01 after stage 2 (B): A 40.0")
    assert followed.news(last=True) == ["after stage 2 (B): A 40.0"], "a command that ended has nothing more to say"
