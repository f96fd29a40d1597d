"""The score of each task's most frequent training answer on its test set, stored beside the predictions."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.data.stage_data import StageData
from pipeline.files.atomic import write_if_other
from pipeline.metrics.blind import majority_score
from pipeline.sequence.answers import SCORES_VERSION
from pipeline.sequence.data import Part
from pipeline.sequence.test_set import TestSet

MAJORITY_FILE = "majority.json"


def majority_scores(folder: Path, train: Sequence[Part], tests: Sequence[TestSet]) -> list[float]:
    """Scores [T] in percent; those stored in `folder` for the same data and metrics are reused."""
    path = folder / MAJORITY_FILE
    known = _known(path)
    row: list[dict[str, Any]] = []
    for part, test in zip(train, tests, strict=True):
        training = StageData([part])
        made_with = [training.fingerprint, len(training), test.data.fingerprint, len(test.data)]
        made_with += [test.metric, test.scoring, SCORES_VERSION]
        found = known.get(test.name)
        if found is None or found["made_with"] != made_with:
            pictured = test.data.keys.has_image.tolist()
            score = majority_score(training, test.texts, test.metric, test.scoring, pictured)
            found = {"score": score, "made_with": made_with}
        row.append({"task": test.name, **found})
    write_if_other(path, json.dumps(row, indent=2, ensure_ascii=False) + "\n")
    return [float(found["score"]) for found in row]


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """The stored scores by task; empty for a file that is damaged or of an earlier version."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return {found["task"]: found for found in json.loads(path.read_text("utf-8"))}
    return {}
