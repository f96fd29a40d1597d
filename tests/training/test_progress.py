"""What a training tells: its speeds and the time that is left, as a bar on a terminal and as lines elsewhere."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.clip.learning.model import PromptedCLIP
from pipeline.console.log import log_to_terminal
from pipeline.console.progress import Estimate, ProgressLog, clock, counted
from pipeline.prompts.model import LearnerOnLMM
from pipeline.runs.layout import METRICS, label_of


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock: what stands here is the time."""
    now = [100.0]
    monkeypatch.setattr("pipeline.console.progress.time.perf_counter", lambda: now[0])
    return now


def terminal(is_one: bool = True) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=is_one, width=110, color_system=None, _environ={}), written


def train(folder: Path, seconds: list[float], console: Console | None, main: bool = True, tokens: bool = True) -> None:
    """Ten steps of two seconds with 8 samples and 24 answer tokens, a line every five."""
    folder.mkdir(exist_ok=True)
    with ProgressLog(folder / METRICS, label_of(folder), 10, main, tokens, console) as shown:
        for step in range(1, 11):
            seconds[0] += 30.0 if step == 1 else 2.0
            shown.moved(step, 24.0, 8.0)
            if step in (1, 5, 10):
                shown.report(1 / step, {"loss_lm": 1 / step}, 0.1)


def test_the_time_left_is_that_of_the_steps_after_the_first() -> None:
    estimate = Estimate(10)
    assert math.isnan(estimate.left(1, 50.0))
    assert estimate.left(3, 54.0) == pytest.approx(7 * 2.0)
    assert estimate.left(10, 68.0) == 0.0


def test_the_time_left_after_a_resumption_counts_the_steps_since() -> None:
    estimate = Estimate(100)
    estimate.left(91, 0.0)
    assert estimate.left(92, 3.0) == pytest.approx(8 * 3.0)


@pytest.mark.parametrize(("left", "text"), [(math.nan, "-:--"), (0.0, "0:00"), (83.9, "1:23"), (7325.0, "2:02:05")])
def test_times_are_written_for_people(left: float, text: str) -> None:
    assert clock(left) == text


def test_a_line_says_the_speeds_of_all_ranks_since_the_line_before(tmp_path: Path, seconds: list[float]) -> None:
    train(tmp_path, seconds, None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 5, 10]
    assert [line["samples_per_s"] for line in lines] == pytest.approx([8 / 30, 4.0, 4.0])
    assert [line["answer_tokens_per_s"] for line in lines] == pytest.approx([24 / 30, 12.0, 12.0])


def test_only_texts_have_tokens(tmp_path: Path, seconds: list[float]) -> None:
    assert (LearnerOnLMM.counts_tokens, PromptedCLIP.counts_tokens) == (True, False)
    train(tmp_path, seconds, None, tokens=False)
    assert "answer_tokens_per_s" not in (tmp_path / "metrics.jsonl").read_text()


def test_other_ranks_write_and_show_nothing(tmp_path: Path, seconds: list[float]) -> None:
    console, written = terminal()
    train(tmp_path, seconds, console, main=False)
    assert not list(tmp_path.iterdir()) and written.getvalue() == ""


def test_a_terminal_has_a_bar_with_loss_speeds_and_the_time_left(tmp_path: Path, seconds: list[float]) -> None:
    console, written = terminal()
    train(tmp_path / "01-Colours.unfinished", seconds, console)
    drawn = [line for line in written.getvalue().splitlines() if "5/10" in line]
    for part in ("01-Colours ", "loss 0.2000", "12.0 tokens/s", "4.0 samples/s", "ETA 0:10"):
        assert part in drawn[-1]


def test_a_bar_moves_between_two_lines(tmp_path: Path, seconds: list[float]) -> None:
    console, written = terminal()
    train(tmp_path, seconds, console)
    assert " 3/10" in written.getvalue() and "ETA 0:14" in written.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_log_file_has_every_line_and_a_terminal_that_has_the_bar_has_none(
    tmp_path: Path, seconds: list[float], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    logger, shown = logging.getLogger("pipeline"), io.StringIO()
    monkeypatch.setattr(logger, "handlers", [])
    log_to_terminal()
    logger.addHandler(logging.FileHandler(tmp_path / "log.txt"))
    monkeypatch.setattr(sys, "stderr", shown)
    train(tmp_path, seconds, terminal(is_terminal)[0])
    expected = "step 5/10  loss 0.2000 (lm 0.2000)  lr 1.00e-01  12.0 tokens/s  4.0 samples/s  ETA 0:10"
    assert expected in (tmp_path / "log.txt").read_text()
    assert (expected in shown.getvalue()) == (not is_terminal)


def test_a_log_line_stands_above_the_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("pipeline")
    monkeypatch.setattr(logger, "handlers", [])
    log_to_terminal()
    console, written = terminal()
    with ProgressLog(tmp_path / METRICS, label_of(tmp_path), 10, True, console=console):
        logger.warning("a checkpoint was saved")
    assert "a checkpoint was saved" in written.getvalue()


def test_answers_are_counted_on_a_terminal_and_come_as_they_are() -> None:
    console, written = terminal()
    parts = [["a", "b"], ["c"]]
    assert list(counted(parts, 3, "answering Colours", console)) == parts
    assert "answering Colours" in written.getvalue() and "3/3" in written.getvalue()
    console, written = terminal()
    assert list(counted(parts, 3, None, console)) == parts and written.getvalue() == ""
