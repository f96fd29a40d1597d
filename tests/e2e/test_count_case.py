"""A task that asks about an earlier task's pictures is added end to end, and costs the earlier task nothing.

The case of docs/own_data.md: with the mean of a task's keys as its prototype, seven of ten of Count's questions went to
the new task's set, and Count fell from 80 to 22.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data_prep.prepare import prepare
from pipeline.cli.commands import app
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.errors import EXIT_OK
from pipeline.sequence.run import run_sequence
from tests.embedded_keys import COUNT_CASE

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

TRAIN, TEST = 300, 150
KEPT = 0.97  # share of a score that has to be left


def demo(folder: Path, seed: int) -> Recipe:
    """Of nano the task Count alone, with fewer samples and steps, and the router under test."""
    changes = {
        "seed": seed,
        "data.root": folder / "coin",
        "data.prepared": folder / "prepared",
        "data.tasks": f"[{{name: Count, limit_train: {TRAIN}, limit_test: {TEST}}}]",
        "method.router": "random_ridge",
        "method.gate": "null",
        "method.share": 0.5,
        "train.steps": 100,
        "train.processes": 1,
        "evaluate.zero_shot": "false",
        "tracking.enabled": "false",
        "run_dir": folder / f"run-{seed}",
    }
    return load_recipe("nano", [f"{name}={value}" for name, value in changes.items()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Count prepared, and under own/ the new task in CoIN layout: the same pictures, answers `two` for `[Two]!`."""
    made = tmp_path_factory.mktemp("count")
    prepare(demo(made, 0), progress=False)
    shutil.copytree(made / "coin" / "images", made / "own" / "images")
    task = made / "own" / "instructions" / "Crowd"
    task.mkdir(parents=True)
    for split, count in (("train", 200), ("test", TEST)):
        entries = json.loads((made / "coin" / "instructions" / "Count" / f"{split}.json").read_text())[:count]
        (task / f"{split}.json").write_text(json.dumps([asked_otherwise(entry) for entry in entries]))
    (task / "task.json").write_text(json.dumps({"metric": "exact_ci", "max_new_tokens": 16}))
    return made


def asked_otherwise(entry: dict[str, Any]) -> dict[str, Any]:
    """A sample of Count in the new task's wording and format."""
    if "text" in entry:
        return {**entry, "text": COUNT_CASE, "answer": plain(entry["answer"])}
    turns = [{"from": "human", "value": f"<image>\n{COUNT_CASE}"}]
    return {**entry, "conversations": [*turns, {"from": "gpt", "value": plain(entry["conversations"][1]["value"])}]}


def plain(answer: str) -> str:
    return answer.strip("[]!").lower()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_new_task_is_learned_and_count_keeps_its_score(folder: Path, seed: int) -> None:
    recipe = demo(folder, seed)
    before = run_sequence(recipe)["accuracy"][0][0]
    assert before > 50.0, "Count was not learned, so it could not be lost"
    added = CliRunner().invoke(app, ["add", str(recipe.run_path), "Crowd", "--root", str(folder / "own"), "--json"])
    assert added.exit_code == EXIT_OK, added.stderr
    result = json.loads(added.stdout.splitlines()[-1])
    count, crowd = result["accuracy"][1]
    assert count >= KEPT * before, (before, count)
    told = result["told"][1]
    assert told[1] > 50.0 and crowd >= KEPT * told[1], (told, crowd)
