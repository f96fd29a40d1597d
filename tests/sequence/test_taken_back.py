"""What `undo` has taken back comes back by `redo` as it was, as long as the run is the same, also after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.cli import sequence
from pipeline.cli.commands import app
from pipeline.config.load import load_run
from pipeline.errors import EXIT_OK, EXIT_RESUMABLE, EXIT_USER, Interrupted, UserError
from pipeline.runs.attempts import newest_attempt
from pipeline.runs.layout import UNDO, unfinished
from pipeline.sequence.again import begin_again
from pipeline.sequence.undo import foretold_redo, foretold_undo, redo, undo
from tests.sequence.made import after_a_kill_anywhere, contents, finish, made, replace_by_a_second, state

ASIDE = ("replaced/",)


def test_a_stage_that_was_taken_back_comes_back_with_its_answers_recipe_and_records(run: Path) -> None:
    before, known = contents(run), state(run)
    undo(run)
    foretold = foretold_redo(run, "Count")
    assert redo(run, "Count") == foretold
    assert contents(run) == before
    now = state(run)
    assert (now["status"], now["stages"], now["data"]) == ("trained", known["stages"], known["data"])
    assert now["mlflow"]["stages"] == known["mlflow"]["stages"] and not now["mlflow"]["replaced"]
    assert foretold_redo(run, "Count") is None, "it is there"


def test_what_was_taken_back_last_comes_back_first(run: Path) -> None:
    once = contents(run)
    replace_by_a_second(run, "train.steps=300")
    twice = contents(run, ASIDE)
    undo(run)
    undo(run)
    redo(run, "Count")
    assert contents(run, ASIDE) == once
    found = redo(run, "Count")
    assert found is not None and (found.kind, found.is_redo) == ("replacement", True)
    attempt = newest_attempt(run)
    assert attempt is not None and attempt.former == found.aside
    assert contents(run, (*ASIDE, "attempt.json")) == {n: t for n, t in twice.items() if n != "attempt.json"}
    undo(run)
    assert contents(run, ASIDE) == once, "what came back is taken back like any other"


def test_a_stage_does_not_come_back_behind_others_than_it_was_trained_behind(run: Path) -> None:
    undo(run)
    path = run / "stages" / "01-Colours" / "COMPLETE"
    checksum = path.read_text()
    path.write_text("another")
    assert redo(run, "Count") is None
    path.write_text(checksum)
    assert foretold_redo(run, "Other") is None
    begin_again(run, "Colours", ["train.steps=300"], {})
    assert foretold_redo(run, "Count") is None, "the stage before is being learned again"
    undo(run)
    assert foretold_redo(run, "Count") is not None
    finish(run / "stages" / "02-Count", "Count learned anew")
    assert foretold_redo(run, "Count") is None


def test_a_former_stage_of_a_finished_attempt_is_not_brought_back_but_taken_back_to(run: Path) -> None:
    replace_by_a_second(run, "train.steps=300")
    assert foretold_redo(run, "Count") is None
    undo(run)
    replace_by_a_second(run, "train.lr_prompt=0.001")
    assert foretold_redo(run, "Count") is None, "it would take the place of another stage than it was taken from"


def test_a_stage_that_was_not_finished_is_lost_and_that_is_said(run: Path) -> None:
    (run / "stages" / "02-Count" / "COMPLETE").unlink()
    (run / "stages" / "02-Count").rename(unfinished(run / "stages" / "02-Count"))
    assert "is not finished, and what it has trained so far is lost" in foretold_undo(run).sentence(run)
    undo(run)
    assert foretold_redo(run, "Count") is None


def test_foretelling_changes_nothing_and_says_what_the_call_does(run: Path) -> None:
    before, known = contents(run), state(run)
    foretold = foretold_undo(run)
    assert (contents(run), state(run)) == (before, known)
    sentence = foretold.sentence(run)
    assert "stage and answers are in replaced/02-Count-1" in sentence
    assert f"`python -m pipeline add {run} Count --again` brings them back" in sentence
    assert undo(run) == foretold
    begin_again(run, "Colours", ["train.steps=300"], {})
    assert "what it has trained so far is lost" in foretold_undo(run).sentence(run)


@pytest.mark.parametrize("kind", ["return", "replacement"])
def test_a_return_that_was_killed_anywhere_is_completed_by_undo(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "replacement":
        replace_by_a_second(run, "train.steps=300")
    undo(run)

    def call(copy: Path) -> None:
        if (copy / UNDO).exists():
            with pytest.raises(UserError, match="was interrupted"):
                redo(copy, "Count")
            undo(copy)
        else:
            redo(copy, "Count")  # nothing where it is complete

    assert after_a_kill_anywhere(monkeypatch, made(tmp_path, run), call) >= 3


def test_a_damaged_note_is_none(run: Path) -> None:
    undo(run)
    note = run / "replaced" / "02-Count-1" / "taken_back.json"
    for content in ("{", "[]", json.dumps({"number": 2})):
        note.write_text(content)
        assert foretold_redo(run, "Count") is None
    assert [task.name for task in load_run(run).data.tasks] == ["Colours"]


def test_a_dry_run_says_what_would_be_done_and_does_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "evaluate", lambda *_: pytest.fail("it was evaluated"))
    before = contents(run)
    done = CliRunner().invoke(app, ["undo", str(run), "--dry-run", "--json"])
    assert done.exit_code == EXIT_OK
    assert "Nothing is changed. Without --dry-run: Count is taken back, and the run answers without" in done.stdout
    wanted = {"task": "Count", "kind": "stage", "kept": "02-Count-1"}
    assert json.loads(done.stdout.splitlines()[-1])["undone"] == wanted
    assert contents(run) == before
    undo(run)
    before = contents(run)
    done = CliRunner().invoke(app, ["add", str(run), "Count", "--again", "--dry-run"])
    assert done.exit_code == EXIT_OK and "Count is the run's last task again" in done.stdout
    assert contents(run) == before


def test_a_stop_of_the_evaluation_behind_an_undo_names_another_command(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command would take back the task before."""

    def stopped(*_: Any) -> None:
        raise Interrupted("Stopped by a test.")

    monkeypatch.setattr(sequence, "evaluate", stopped)
    done = CliRunner().invoke(app, ["undo", str(run)])
    assert done.exit_code == EXIT_RESUMABLE
    assert f"`python -m pipeline evaluate {run}` completes the scores. Do not repeat this command." in done.stderr


def test_without_settings_a_task_of_which_nothing_was_taken_back_is_refused_as_before(run: Path) -> None:
    done = CliRunner().invoke(app, ["add", str(run), "Count", "--again"])
    assert done.exit_code == EXIT_USER and "With the same settings" in done.stderr
