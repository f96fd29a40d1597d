"""The format-free scores of a run's evaluations, beside the accuracy matrix."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.metrics.format_free import format_free_percent
from pipeline.metrics.scoring import Answered, TaskScore, metric_of
from pipeline.runs.layout import after_folder, zero_shot_folder
from pipeline.sequence.matrix import Row
from pipeline.sequence.test_set import TestSet


def format_free_scores(run: Path, tests: Sequence[TestSet], rows: Sequence[Row], zero_shot: bool) -> dict[str, Any]:
    """`format_free` of matrix.json: the scores [T, T] in percent like `accuracy`, and those of the frozen model [T].

    Args:
        run: the run's folder.
        tests: the test sets.
        rows: the accuracy matrix, whose missing scores are missing here too.
        zero_shot: whether the frozen model was evaluated.
    """
    accuracy = [
        [
            None if score is None else format_free_score(after_folder(run, number), test)
            for score, test in zip(row, tests, strict=True)
        ]
        for number, row in enumerate(rows, start=1)
    ]
    frozen = [format_free_score(zero_shot_folder(run), test) for test in tests] if zero_shot else None
    return {"accuracy": accuracy, "zero_shot": frozen}


def format_free_score(folder: Path, test: TestSet) -> float | None:
    """The format-free score of a task's answers in an evaluation's folder; None where they cannot be read.

    An evaluation of a version without this score has the answers, from which it is computed.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads((folder / f"{test.name}.score.json").read_text("utf-8"))
        if "format_free" in told:
            return float(told["format_free"])
        lines = [json.loads(line) for line in (folder / f"{test.name}.jsonl").read_text("utf-8").splitlines()]
        if len(lines) != len(test.data):
            return None
        answered = [
            Answered(line["prediction"], sample.answer, sample.meta)
            for line, sample in zip(lines, test.texts, strict=True)
        ]
        scored = TaskScore(float(told["score"]), {}, [float(line["score"]) for line in lines])
        return format_free_percent(metric_of(test.metric), answered, scored)
    return None
