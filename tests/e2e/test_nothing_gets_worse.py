"""A verb that fails leaves what a finished run has as it was, whichever verb it is and whatever is wrong."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.adapter import export
from pipeline.cli.commands import app
from pipeline.errors import EXIT_OK, EXIT_USER
from pipeline.sequence.run import evaluate_run, run_sequence
from tests.e2e.conftest import MakeRecipe, prepare_project, recipe_on
from tests.wrong_inputs import flipped, full_disk_of, replaced

pytestmark = pytest.mark.e2e
KEPT = ("matrix.json", "run.json", "report.html", "config.yaml")


@dataclass(frozen=True)
class Finished:
    """A finished run of two tasks, with an adapter made of it; a third task is there to be added."""

    project: Path
    run: Path
    recipe: Path
    adapter: Path

    def content(self) -> dict[str, bytes]:
        """The files that say what is finished, by name."""
        paths = [*(self.run / name for name in KEPT), *sorted((self.run / "stages").rglob("*.*"))]
        return {str(path.relative_to(self.run)): path.read_bytes() for path in paths if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    project = prepare_project(tmp_path_factory.mktemp("finished"), tasks=3)
    recipe = recipe_on(project, project, tasks=2)
    run_sequence(recipe)
    recipe.dump_yaml(project / "recipe.yaml")
    export(recipe.run_path, project / "adapter")
    return Finished(project, recipe.run_path, project / "recipe.yaml", project / "adapter")


@contextlib.contextmanager
def other_data(finished: Finished) -> Iterator[None]:
    with replaced(finished.project / "data" / "T1" / "train") as split:
        shutil.copytree(finished.project / "data" / "T2" / "train", split.parent / "train")
        yield


@contextlib.contextmanager
def other_test_data(finished: Finished) -> Iterator[None]:
    """Of no stage, so that no checkpoint tells; and a sample of it cannot be read."""
    with replaced(finished.project / "data" / "T0" / "test") as split:
        shutil.copytree(split, split.parent / "test")
        (split.parent / "test" / "shard-000000.tar").unlink()
        yield


@contextlib.contextmanager
def no_weights(finished: Finished) -> Iterator[None]:
    with replaced(finished.project / "llava" / "model.safetensors"):
        yield


@contextlib.contextmanager
def damaged_stage(finished: Finished) -> Iterator[None]:
    with flipped(finished.run / "stages" / "02-T1" / "prompts.safetensors"):
        yield


@contextlib.contextmanager
def unreadable_predictions(finished: Finished) -> Iterator[None]:
    path = finished.run / "eval" / "after-02" / "T0.jsonl"
    with replaced(path):
        path.mkdir()
        yield


@contextlib.contextmanager
def full_disk(finished: Finished) -> Iterator[None]:
    with full_disk_of(finished.run):
        yield


WRONG = (other_data, other_test_data, no_weights, damaged_stage, unreadable_predictions, full_disk)
# What has to fail under each, so that a fault that is not noticed any more is; the others may do their work.
FAILING = {
    "other_data": {"run", "train", "evaluate"},
    "other_test_data": {"run", "train", "evaluate", "check"},
    "no_weights": {"run", "train", "evaluate", "predict", "serve", "check"},
    "damaged_stage": {"run", "train", "evaluate", "add", "export", "predict", "serve"},
    "unreadable_predictions": {"run", "evaluate"},
    "full_disk": {"run", "evaluate", "report"},
}


def commands(finished: Finished, out: Path, wrong: str) -> dict[str, list[str]]:
    run, recipe = str(finished.run), str(finished.recipe)
    found = {
        "check": ["check", recipe],
        "run": ["run", recipe],
        "train": ["train", recipe],
        "evaluate": ["evaluate", run],
        "add": ["add", run, "T2", "--root", str(finished.project / "coin")],
        "report": ["report", run],
        "export": ["export", run, str(out / "adapter")],
        "predict": ["predict", run, "--question", "what?"],
        "prune": ["prune", str(finished.adapter), "T9", "--into", str(out / "pruned")],
        "merge": ["merge", run, run, "--into", str(out / "merged")],
        "serve": ["serve", run, "--port", "0"],
        "ls": ["ls", str(finished.run.parent)],
    }
    if wrong in ("unreadable_predictions", "full_disk", "other_data"):
        del found["add"]  # trains its stage first, which is no failure; see the test of an added task below
    return found


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_no_verb_that_fails_changes_a_finished_run(
    finished: Finished,
    tmp_path: Path,
    wrong: Callable[[Finished], AbstractContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)  # where nothing is wrong for it, it would serve
    before, failed = finished.content(), set()
    assert json.loads(before["run.json"])["status"] == "done"
    with wrong(finished):
        damaged = finished.content()
        for verb, command in commands(finished, tmp_path, wrong.__name__).items():
            done = CliRunner().invoke(app, command)
            after = finished.content()
            if done.exit_code == EXIT_OK:  # these are written by a verb that does its work
                damaged |= {name: after[name] for name in ("run.json", "report.html") if name in after}
            else:
                failed.add(verb)
            changed = [name for name in sorted({*damaged, *after}) if damaged.get(name) != after.get(name)]
            assert not changed, f"{verb} (exit code {done.exit_code}): {done.output}"
            assert json.loads((finished.run / "run.json").read_text())["status"] == "done", verb
    assert failed >= FAILING[wrong.__name__]
    evaluate_run(finished.run)
    assert (finished.run / "matrix.json").read_bytes() == before["matrix.json"]


def test_a_task_that_cannot_be_added_leaves_the_run_finished(make: MakeRecipe, prepared: Path) -> None:
    recipe = make(tasks=2)
    run_sequence(recipe)
    run = recipe.run_path
    finished = Finished(prepared, run, run, run)
    before = finished.content()
    with no_weights(finished):
        done = CliRunner().invoke(app, ["add", str(run), "T2", "--root", str(prepared / "coin")])
    assert done.exit_code != EXIT_OK
    assert finished.content() == before


def test_a_task_whose_training_fails_leaves_the_run_finished(
    make: MakeRecipe, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tasks=2)
    run_sequence(recipe)
    run = recipe.run_path
    before = {name: (run / name).read_bytes() for name in ("matrix.json", "report.html")}
    with monkeypatch.context() as patch:
        patch.setattr(
            "pipeline.sequence.stage_files.save_stage", lambda *_: (_ for _ in ()).throw(RuntimeError("no room"))
        )
        done = CliRunner().invoke(app, ["add", str(run), "T2", "--root", str(prepared / "coin")])
    assert done.exit_code == 1
    state = json.loads((run / "run.json").read_text())
    assert (state["status"], state["stage"]) == ("done", 2)
    assert {name: (run / name).read_bytes() for name in before} == before
    again = CliRunner().invoke(app, ["add", str(run), "T2", "--root", str(prepared / "coin")])
    assert again.exit_code == EXIT_OK, again.output
    state = json.loads((run / "run.json").read_text())
    assert (state["status"], state["stage"]) == ("done", 3)


def test_fewer_stages_than_are_there_take_no_row_of_the_matrix(make: MakeRecipe) -> None:
    recipe = make(tasks=2)
    whole = run_sequence(recipe)
    run_sequence(recipe, until=1)
    assert json.loads((recipe.run_path / "matrix.json").read_text())["accuracy"] == whole["accuracy"]
    run_sequence(recipe, stages="train")
    assert json.loads((recipe.run_path / "run.json").read_text())["status"] == "done"


def test_a_stage_that_is_trained_anew_takes_its_rows_of_the_matrix_along(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(tasks=2)
    run_sequence(recipe)
    run = recipe.run_path
    shutil.rmtree(run / "stages" / "02-T1")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(
            "pipeline.sequence.stage_files.save_stage", lambda *_: (_ for _ in ()).throw(RuntimeError("no room"))
        )
        run_sequence(recipe)
    state = json.loads((run / "run.json").read_text())
    assert (state["status"], state["stage"]) == ("failed", 1)


def test_a_damaged_input_is_told_as_the_users(finished: Finished) -> None:
    with other_data(finished):
        done = CliRunner().invoke(app, ["evaluate", str(finished.run)])
    assert done.exit_code == EXIT_USER
    assert "trained with another data" in done.output


def test_the_tracked_run_is_as_finished_as_the_run_folder(make: MakeRecipe, prepared: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    recipe = make(tasks=2)
    recipe = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"enabled": True, "uri": store})})
    run_sequence(recipe)
    run, client = recipe.run_path, MlflowClient(store)
    parent = json.loads((run / "run.json").read_text())["mlflow"]["parent"]
    before = client.get_run(parent)
    assert before.info.status == "FINISHED"
    finished = Finished(prepared, run, run, run)
    with unreadable_predictions(finished):
        assert CliRunner().invoke(app, ["evaluate", str(run)]).exit_code != EXIT_OK
    after = client.get_run(parent)
    assert (after.info.status, after.data.metrics) == ("FINISHED", before.data.metrics)
