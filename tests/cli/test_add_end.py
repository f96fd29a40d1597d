"""What `add` says at its end of a task that was not learned: by its held-out samples, and by its test samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli.commands import app
from pipeline.config.load import load_recipe
from pipeline.errors import EXIT_OK
from pipeline.sequence.add_effect import Interference
from pipeline.sequence.add_task import Addition
from pipeline.sequence.learned import Learned

GAINED_NOTHING = "Charts gained nothing: it scores 31.2, and the frozen model 31.2. 16 test samples say little."
HELD_OUT = "Charts was not learned: on its 3 held-out samples its own module scores 0.0"
AGAIN = "add run Charts --again --set train.lr_prompt=RATE"


def added(folder: Path, patch: pytest.MonkeyPatch, test_score: float, held_out: float | None) -> tuple[str, list[Any]]:
    """What `add` prints of the second task of a finished run, and the faults of its JSON object.

    Args:
        folder: an empty one.
        patch: puts given scores in the place of training.
        test_score: of the task, in percent; that of the frozen model is 31.2.
        held_out: its score on held-out samples, of which the most frequent answer has a third; None: there are none.
    """
    patch.chdir(folder)
    recipe = load_recipe("nano", ["data.tasks=[Colours, Charts]"])
    run = Path("run")
    recipe.dump_yaml(run / "config.yaml")
    scores = {"accuracy": [[90.0, None], [90.0, test_score]], "zero_shot": [0.0, 31.2], "majority": [10.0, 25.0]}
    (run / "matrix.json").write_text(json.dumps({"tasks": ["Colours", "Charts"], **scores}))
    used = {task: {"train": {"used": 61}, "test": {"used": 16}} for task in ("Colours", "Charts")}
    (run / "run.json").write_text(json.dumps({"stages": ["Colours", "Charts"], "data": used}))
    learned = None if held_out is None else Learned("Charts", 3, held_out, 33.3, None, 61).to_json()
    results: list[Any] = []
    patch.setattr("pipeline.sequence.add_task.prepare_addition", lambda *_: Addition(run, recipe, "Charts", False))
    patch.setattr("pipeline.sequence.add_effect.measure", lambda *_: Interference([]))
    patch.setattr("pipeline.cli.sequence.start", lambda *given: results.append(given[-1]({"learned": learned})))
    done = CliRunner().invoke(app, ["add", "run", "Charts"])
    assert done.exit_code == EXIT_OK, done.output
    return done.stdout, [fault["kind"] for fault in results[0]["faults"]]


@pytest.mark.parametrize("held_out", [66.7, None])
def test_a_task_without_gain_on_its_test_samples_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: float | None
) -> None:
    said, faults = added(tmp_path, monkeypatch, 31.2, held_out)
    assert GAINED_NOTHING in said and AGAIN in said and faults == ["no_gain"]


def test_a_task_that_is_poor_on_both_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, faults = added(tmp_path, monkeypatch, 31.2, 0.0)
    assert HELD_OUT in said and GAINED_NOTHING not in said and faults == ["no_gain"]


def test_nothing_is_said_of_a_task_that_was_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert added(tmp_path, monkeypatch, 80.0, 66.7) == ("", [])
