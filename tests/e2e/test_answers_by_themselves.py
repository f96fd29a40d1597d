"""An answer is a function of its question and of what was learned: not of the batch that it was answered in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import registry
from pipeline.sequence.run import run_sequence
from tests.e2e.conftest import MakeRecipe

pytestmark = pytest.mark.e2e
OPTIONS: dict[str, dict[str, Any]] = {"modular": {"depth": 2}}  # the tiny model has two layers
# Learning that a tiny model's answers show: an answer that no module reaches would be the same in every batch.
LEARNS = {"train__steps": 3, "train__lr_prompt": 0.5, "evaluate__zero_shot": False}


def answers(run: Path) -> dict[str, Any]:
    """Predictions, and what every sample got, by evaluation and task."""
    return {
        f"{path.parent.name}/{path.stem}": [
            {name: line.get(name) for name in ("id", "prediction", "selected", "weights")}
            for line in map(json.loads, path.read_text("utf-8").splitlines())
        ]
        for path in sorted((run / "eval").glob("*/*.jsonl"))
    }


@pytest.mark.parametrize("name", list(registry.BUILT_IN["methods"]))
def test_a_batch_of_one_and_of_several_answer_alike(make: MakeRecipe, name: str) -> None:
    fields = LEARNS if name != "zero_shot" else {}
    method = {"name": name, **OPTIONS.get(name, {})}
    recipe = make(method=method, tasks=2, evaluate__batch=4, **fields)
    run_sequence(recipe)
    together = answers(recipe.run_path)
    assert together and any(line["prediction"] for lines in together.values() for line in lines)
    for batch in (1, 3):
        shutil.rmtree(recipe.run_path / "eval")
        run_sequence(make(method=method, tasks=2, evaluate__batch=batch, **fields))
        assert answers(recipe.run_path) == together, f"with batches of {batch}"
