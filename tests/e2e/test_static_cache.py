"""A run whose answers have a cache of fixed size predicts what a run with a growing one predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.sequence.run import run_sequence
from tests.e2e.conftest import MakeRecipe

pytestmark = pytest.mark.e2e


def predictions(run: Path) -> dict[str, list[Any]]:
    """What was answered, by file."""
    return {
        str(path.relative_to(run)): [json.loads(line)["prediction"] for line in path.read_text().splitlines()]
        for path in sorted(run.rglob("*.jsonl"))
        if "prediction" in path.read_text()
    }


@pytest.mark.parametrize("shared", [False, True])
def test_predictions_are_the_same(make: MakeRecipe, tmp_path: Path, shared: bool) -> None:
    found = []
    for static in (False, True):
        run = tmp_path / f"{static}"
        changes = {"evaluate__static_cache": static, "evaluate__share_images": shared}
        run_sequence(make(tasks=2, run_dir=str(run), **changes))
        found.append(predictions(run))
    assert found[0] == found[1] and len(found[0]) >= 3
    assert len({answer for answers in found[0].values() for answer in answers}) > 1
