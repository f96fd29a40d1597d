"""Which held-out samples an answer head is weighed against the decoder with."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest

from pipeline.data.sample_list import SampleList
from pipeline.data.selection import Selection
from pipeline.data.stage_data import StageData
from pipeline.sequence.answer_head import HELD_OUT, _single_turns, answer_head
from tests.training.worlds import make_samples

NOT_USED: Any = None
TURNS = {"turns": [{"question": "sure?", "answer": "yes"}]}


def held_out(count: int, turns: set[int]) -> StageData:
    """So many held-out samples, of which those with these numbers have further turns."""
    samples, keys = make_samples(count)
    changed = [dataclasses.replace(one, meta=TURNS if n in turns else {}) for n, one in enumerate(samples)]
    return StageData([(SampleList(changed), keys, None)])


def test_samples_with_further_turns_do_not_count() -> None:
    assert _single_turns(held_out(6, {0, 3})) == [1, 2, 4, 5]
    many = _single_turns(held_out(HELD_OUT + 20, {0}))
    assert len(many) == HELD_OUT and 0 not in many


def test_a_task_whose_held_out_samples_all_have_further_turns_has_no_head(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = answer_head(NOT_USED, NOT_USED, held_out(3, {0, 1, 2}), Selection.none(3), NOT_USED, "T0")
    assert found == {}
    assert "T0 holds no samples of one turn out" in caplog.text
