"""A stage that is trained again, or taken back, keeps its run and its model in MLflow, and both are marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.runs.layout import STATE
from pipeline.tracking.open import make_tracker, sequence_facts
from pipeline.tracking.replaced import attach, detach
from tests.tracking.test_tracking import checkpoint, client_of, creation, recipe, store

__all__ = ["creation", "store"]  # fixtures

LABEL, TASK = "01-colour", "colour"


def test_the_former_run_is_marked_when_the_new_stage_is_whole_and_no_longer_when_it_is_back(
    tmp_path: Path, store: Path
) -> None:
    run, place = tmp_path / "small-s0", tmp_path / "small-s0" / "replaced" / "01-colour-1"
    place.mkdir(parents=True)
    client = client_of(store)

    def state() -> dict[str, Any]:
        path = run / STATE
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def continued(trains: str = "", fails: bool = False) -> None:
        tracker = make_tracker(sequence_facts(recipe(store)), run, rank=0)
        try:
            with tracker.sequence(state()):
                if trains:
                    with tracker.stage(0, TASK):
                        if fails:
                            raise ValueError
                        tracker.stage_model(checkpoint(tmp_path / trains), TASK, {})
        except ValueError:
            pass
        (run / STATE).write_text(json.dumps({"mlflow": tracker.run_ids()}))

    def marks(ids: dict[str, Any]) -> tuple[str | None, str | None]:
        tags = client.get_run(ids["stages"][LABEL]).data.tags
        return tags.get("replaced"), client.get_logged_model(ids["models"][TASK]).tags.get("replaced")

    continued("first")
    first = state()["mlflow"]
    detach(run, LABEL, TASK, place, at_once=False)
    assert state()["mlflow"]["stages"] == {}
    continued("second", fails=True)
    assert marks(first) == (None, None), "the new stage is not whole yet"
    continued("second")
    second = state()["mlflow"]
    assert second["stages"][LABEL] != first["stages"][LABEL] and second["models"][TASK] != first["models"][TASK]
    assert marks(first) == ("true", "true") and marks(second) == (None, None)
    assert "replaced" not in second, "it is marked once"

    other = place.with_name("01-colour-2")
    other.mkdir()
    detach(run, LABEL, TASK, other, at_once=True)
    attach(run, LABEL, TASK, place)
    continued()
    assert marks(first) == ("false", "false") and marks(second) == ("true", "true")
    now = state()["mlflow"]
    assert (now["stages"], now["models"]) == (first["stages"], first["models"])
    assert "replaced" not in now and "restored" not in now


def test_curves_of_the_former_stage_are_kept_under_a_name_of_their_own(tmp_path: Path) -> None:
    place = tmp_path / "replaced" / "01-colour-1"
    (tmp_path / "tensorboard" / LABEL).mkdir(parents=True)
    (tmp_path / "tensorboard" / LABEL / "events").write_text("first")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "runs.json").write_text(json.dumps({LABEL: {"id": "a"}}))
    detach(tmp_path, LABEL, TASK, place, at_once=False)
    assert (tmp_path / "tensorboard" / f"{LABEL}.01-colour-1" / "events").read_text() == "first"
    assert json.loads((tmp_path / "wandb" / "runs.json").read_text()) == {f"{LABEL}.01-colour-1": {"id": "a"}}
    attach(tmp_path, LABEL, TASK, place)
    assert (tmp_path / "tensorboard" / LABEL / "events").read_text() == "first"
    assert json.loads((tmp_path / "wandb" / "runs.json").read_text()) == {LABEL: {"id": "a"}}
