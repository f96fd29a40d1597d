"""What run.json says of a run when another call works on it."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.runs.layout import STATE
from pipeline.sequence.results import RunResults


def test_a_call_that_finds_everything_done_takes_no_time_back(tmp_path: Path) -> None:
    spent = {"train.Count_s": 30.0, "evaluate_s": 65.1, "total_s": 569.1}
    (tmp_path / STATE).write_text(json.dumps({"status": "done", "timing": spent}))
    again = RunResults(tmp_path).times({"evaluate_s": 0.2, "total_s": 1.4})
    assert again == {"train.Count_s": 30.0, "evaluate_s": 65.3, "total_s": 570.5}


def test_the_first_call_s_times_are_its_own(tmp_path: Path) -> None:
    assert RunResults(tmp_path).times({"train.Count_s": 30.0, "total_s": 33.0}) == {
        "train.Count_s": 30.0,
        "total_s": 33.0,
    }
