"""What a new task does to earlier ones is told by similarities, and so is what to do about it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.add_effect import Effect, _effect, advice
from tests.pipeline.test_tracking import recipe

RUN = Path("runs/mine")


def sentences(effect: Effect, gate: float | None = 0.1) -> str:
    made = recipe("sqlite:///nowhere.db")
    method = made.method.model_copy(update={"gate": gate})
    return " ".join(advice([effect], made.model_copy(update={"method": method}), RUN, "New"))


def test_shares_and_the_gate_follow_from_the_similarities() -> None:
    rows = [[0.7, 0.2, 0.62], [0.7, 0.1, 0.64], [0.5, 0.1, 0.6], [0.7, 0.3, 0.1]]
    found = _effect("Old", rows, [True, True, True, False])
    assert (found.inserted, found.first) == (75.0, 25.0)
    assert found.gate == pytest.approx(0.05)  # 0.7 - 0.64, rounded down


def test_a_task_that_is_left_alone_needs_no_word() -> None:
    assert sentences(Effect("Old", inserted=2.0, first=0.0, gate=0.05)) == ""
    assert sentences(Effect("Old", inserted=90.0, first=50.0, gate=0.0, before=80.0, after=79.5)) == ""


def test_where_the_set_comes_beside_the_own_one_a_smaller_gate_is_named() -> None:
    said = sentences(Effect("Old", inserted=60.0, first=0.0, gate=0.04, before=80.0, after=70.0))
    assert "add runs/mine New --gate 0.04" in said and "prune adapter New" in said and "words of their own" not in said
    assert "--gate 0.04" in sentences(Effect("Old", inserted=60.0, first=0.0, gate=0.04), gate=None)
    assert "--gate" not in sentences(Effect("Old", inserted=60.0, first=0.0, gate=0.2))


def test_where_the_set_is_nearer_than_the_own_one_no_gate_is_promised() -> None:
    said = sentences(Effect("Old", inserted=70.0, first=70.0, gate=0.04, before=80.0, after=20.0))
    assert "words of their own" in said and "--gate" not in said
