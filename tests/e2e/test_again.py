"""`add --again` and `undo` from end to end on a tiny model: what is trained, answered, tracked and served."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from data_prep.own_task import NewTask, make_task
from pipeline.adapter.load import source_of
from pipeline.cli.commands import app
from pipeline.config.recipe import Recipe
from pipeline.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USER, Interrupted
from pipeline.ranks.shutdown import STOP_SIGNALS
from pipeline.runs.attempts import put_aside
from pipeline.sequence import stage, stage_files
from pipeline.sequence.run import run_sequence
from tests.e2e.own_task import make_mine

pytestmark = pytest.mark.e2e


LEFT_BY_A_RUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Killed(BaseException):
    """In place of a kill."""


@pytest.fixture
def run(make: Callable[..., Recipe], tmp_path: Path) -> Iterator[Path]:
    """A run of T0 and T1, tracked in a database, to which Mine was added."""
    tracking = {"enabled": True, "uri": f"sqlite:///{tmp_path / 'mlflow.db'}", "registry": False}
    recipe = make(tasks=2, data__validation_share=0.5, evaluate__zero_shot=False, tracking=tracking)
    run_sequence(recipe)
    make_mine(tmp_path)
    run = recipe.run_path
    (tmp_path / "before.yaml").write_bytes((run / "config.yaml").read_bytes())
    verb("add", str(run), "Mine", "--root", str(tmp_path / "own"))
    yield run


def verb(*arguments: str, code: int = EXIT_OK) -> dict[str, Any]:
    """The result of a verb of the command line, of one that fails its error."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    with pytest.MonkeyPatch.context() as patched:
        for name in LEFT_BY_A_RUN:  # a user's next command has them not
            patched.delenv(name, raising=False)
        done = CliRunner().invoke(app, [*arguments, "--json"])
    for number, handler in handlers.items():  # a rank that was interrupted ignores them until it ends
        signal.signal(number, handler)
    assert done.exit_code == code, done.output
    return dict(json.loads(done.stdout.splitlines()[-1]))


def again(run: Path, *settings: str, code: int = EXIT_OK) -> dict[str, Any]:
    given = [part for text in settings for part in ("--set", text)]
    return verb("add", str(run), "Mine", "--again", *given, code=code)


def files(run: Path, *patterns: str) -> dict[str, bytes]:
    """Files of the run by their path, with their content."""
    found = (path for pattern in patterns for path in run.glob(pattern) if path.is_file())
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in found}


def matrix(run: Path) -> dict[str, Any]:
    """matrix.json without seconds."""
    content = json.loads((run / "matrix.json").read_text())
    content.pop("costs")
    return dict(content)


def tracked(run: Path, tmp_path: Path, label: str) -> list[str | None]:
    """The tag `replaced` of MLflow's runs of a stage, the oldest first."""
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = json.loads((run / "run.json").read_text())["mlflow"]["experiment"]
    found = client.search_runs([experiment], f"tags.mlflow.runName = '{label}'", order_by=["attributes.start_time"])
    return [one.data.tags.get("replaced") for one in found]


def test_the_last_task_is_learned_again_and_both_steps_are_undone_and_brought_back(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = files(run, "stages/0[12]-*/*", "eval/after-0[12]/*")
    once, scores = files(run, "stages/03-Mine/*", "eval/*-03/*"), matrix(run)

    foretold = verb("add", str(run), "Mine", "--again", "--set", "train.steps=3", "--dry-run")["foretold"]
    assert [effect["task"] for effect in foretold] == ["T0", "T1"]
    assert files(run, "stages/03-Mine/*", "eval/*-03/*") == once and not (run / "attempt.json").exists()

    result = again(run, "train.steps=3", "train.lr_prompt=0.01")
    assert result["tasks"] == ["T0", "T1", "Mine"] and None not in result["accuracy"][2]
    assert result["accuracy"][:2] == scores["accuracy"][:2] and result["learned"]["task"] == "Mine"
    assert files(run, "stages/0[12]-*/*", "eval/after-0[12]/*") == earlier, "other tasks' stages do not change"
    meta = json.loads((run / "stages" / "03-Mine" / "meta.json").read_text())
    assert (meta["attempt"], meta["steps"]) == (2, 3)
    assert meta["settings"] == ["train.steps=3", "train.lr_prompt=0.01"]
    kept = {name: text for name, text in once.items() if not name.startswith("eval/ahead")}
    place = run / "replaced" / "03-Mine-1"
    moved = files(place, "stage/*", "eval/*/*")
    assert {name.replace("stages/03-Mine", "stage"): text for name, text in kept.items()} == moved
    twice = files(run, "stages/03-Mine/prompts.safetensors")
    assert twice["stages/03-Mine/prompts.safetensors"] != once["stages/03-Mine/prompts.safetensors"]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["steps"] == 3
    assert tracked(run, tmp_path, "03-Mine") == ["true", None]
    assert json.loads((run / "run.json").read_text())["status"] == "done"

    undone = verb("undo", str(run))
    assert undone["undone"] == {"task": "Mine", "kind": "replacement", "kept": "03-Mine-2"}
    assert files(run, "stages/03-Mine/*", "eval/*-03/*") == once and matrix(run) == scores
    assert tracked(run, tmp_path, "03-Mine") == ["false", "true"]
    (kept_again,) = files(run / "replaced" / "03-Mine-2", "stage/prompts.safetensors").values()
    assert [kept_again] == list(twice.values()), "what was taken back is kept"

    undone = verb("undo", str(run))
    assert undone["undone"]["kind"] == "stage" and undone["tasks"] == ["T0", "T1"]
    assert undone["accuracy"] == [row[:2] for row in scores["accuracy"][:2]]
    recipes = [yaml.safe_load(path.read_text()) for path in (run / "config.yaml", tmp_path / "before.yaml")]
    for recipe in recipes:
        del recipe["data"]["prepare_first"]  # the tasks may come from different folders since
    assert recipes[0] == recipes[1]
    assert files(run, "stages/0[12]-*/*", "eval/after-0[12]/*") == earlier and not files(run, "stages/03-*/*")
    assert source_of(run).pool.names == ["T0", "T1"]
    assert tracked(run, tmp_path, "03-Mine") == ["true", "true"]

    with monkeypatch.context() as patched:
        patched.setattr(stage, "train_stage", lambda *_: pytest.fail("it was trained"))
        back = again(run)
        assert back["restored"] == {"task": "Mine", "kind": "return", "kept": ""}
        assert files(run, "stages/03-Mine/*", "eval/*-03/*") == once and matrix(run) == scores
        assert tracked(run, tmp_path, "03-Mine") == ["false", "true"]
        assert again(run)["restored"]["kind"] == "replacement"
        assert files(run, "stages/03-Mine/prompts.safetensors") == twice
        assert tracked(run, tmp_path, "03-Mine") == ["true", "false"]
    kinds = [verb("undo", str(run))["undone"]["kind"] for _ in range(2)]
    assert kinds == ["replacement", "stage"] and source_of(run).pool.names == ["T0", "T1"]

    verb("add", str(run), "Mine", "--root", str(tmp_path / "own"))
    assert files(run, "stages/03-Mine/prompts.safetensors") == {
        name: text for name, text in once.items() if name.endswith("prompts.safetensors")
    }, "the same as when it was added first"


def test_an_attempt_that_stops_leaves_the_finished_stage_in_use(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, scores = files(run, "stages/03-Mine/*", "eval/*-03/*", "config.yaml"), matrix(run)

    def stopped(*_: Any) -> None:
        raise Interrupted("Stopped by a test.")

    with monkeypatch.context() as patched:
        patched.setattr(stage, "train_stage", stopped)
        assert "Stopped by a test" in again(run, "train.steps=3", code=EXIT_RESUMABLE)["error"]
    now = files(run, "stages/03-Mine/*", "eval/*-03/*")
    assert now == {name: text for name, text in once.items() if name != "config.yaml"} and matrix(run) == scores
    assert source_of(run).pool.names == ["T0", "T1", "Mine"]
    assert json.loads((run / "run.json").read_text())["status"] == "stopped"
    make_task(NewTask("Other", tmp_path / "own"), tmp_path / "photos", tmp_path / "mine.csv")
    refused = verb("add", str(run), "Other", "--root", str(tmp_path / "own"), code=EXIT_USER)
    assert "Mine of" in refused["error"] and "is being learned again" in refused["error"]
    assert verb("evaluate", str(run))["accuracy"] == scores["accuracy"], "the finished stage answers until then"
    assert verb("undo", str(run))["undone"]["kind"] == "attempt"
    assert files(run, "stages/03-Mine/*", "eval/*-03/*", "config.yaml") == once and matrix(run) == scores
    assert tracked(run, tmp_path, "03-Mine") == [None, "true"]
    assert not (run / "replaced").exists() and not (run / "attempt.json").exists()


def test_a_kill_between_the_two_renames_is_made_good_without_training(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = source_of(run).pool.whole_fingerprint()

    def killed(*arguments: Any) -> None:
        put_aside(*arguments)
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(stage_files, "put_aside", killed)
        with pytest.raises(Killed):
            CliRunner().invoke(app, ["add", str(run), "Mine", "--again", "--set", "train.steps=3"])
    assert not (run / "stages" / "03-Mine").exists()
    served = source_of(run).pool
    assert served.names == ["T0", "T1", "Mine"] and served.whole_fingerprint() == once, "the former one answers"
    monkeypatch.setattr(stage, "train_stage", lambda *_: pytest.fail("it was trained"))
    result = verb("run", str(run / "config.yaml"), "--set", f"run_dir={run}")
    assert None not in result["accuracy"][2]
    meta = json.loads((run / "stages" / "03-Mine" / "meta.json").read_text())
    assert (meta["attempt"], meta["steps"]) == (2, 3)
    assert source_of(run).pool.whole_fingerprint() != once
    assert tracked(run, tmp_path, "03-Mine") == ["true", None]
