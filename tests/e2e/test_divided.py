"""A run on several ranks whose answers come from models on two of them each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.runs.layout import EVALUATIONS
from pipeline.sequence.run import run_sequence
from tests.e2e.conftest import recipe_on
from tests.processes import torchrun

TASKS, LIMIT_S = 2, 300


def predictions(run: Path) -> dict[str, str]:
    """By place: zero-shot, after each stage, with the task told, held out."""
    files = sorted((run / EVALUATIONS).rglob("*.jsonl"))
    return {str(path.relative_to(run)): path.read_text() for path in files}


@pytest.mark.gloo
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "deepspeed"), [(2, "zero2"), (4, "zero3")])
def test_every_evaluation_of_a_run_is_that_of_one_rank(
    prepared: Path, tmp_path: Path, ranks: int, deepspeed: str
) -> None:
    file = {"train__deepspeed": f"ds_configs/{deepspeed}.json"}
    evaluate = {"told": "stages", "ahead": True, "held_out": True, "batch": 2}
    many = recipe_on(
        prepared, tmp_path / "many", TASKS, evaluate={**evaluate, "engine": "sharded", "shards": 2}, **file
    )
    many.dump_yaml(tmp_path / "many.yaml")
    torchrun(["-m", "pipeline", "run", str(tmp_path / "many.yaml")], ranks, LIMIT_S)
    found = predictions(many.run_path)

    one = recipe_on(prepared, tmp_path / "one", TASKS, evaluate=evaluate, **file)
    shutil.copytree(many.run_path, one.run_path)
    for place in found:
        (one.run_path / place).unlink()
    run_sequence(one, stages="evaluate")
    expected = predictions(one.run_path)
    assert len(found) > 2 * TASKS and found == expected

    torchrun(["-m", "pipeline", "run", str(tmp_path / "many.yaml")], ranks, LIMIT_S)  # nothing is left to answer
    assert predictions(many.run_path) == expected
