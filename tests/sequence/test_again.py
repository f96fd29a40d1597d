"""A further attempt at the last stage, and `undo`: what is in the run's folder, also after a kill at any point."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load_run
from pipeline.errors import UserError
from pipeline.files.lock import FileLock
from pipeline.runs import attempts, lock
from pipeline.runs.attempts import newest_attempt, open_attempt, put_aside
from pipeline.runs.layout import UNDO, unfinished
from pipeline.sequence.add_task import prepare_addition
from pipeline.sequence.again import begin_again, require_last
from pipeline.sequence.undo import undo
from tests.sequence.made import after_a_kill_anywhere, contents, made, replace_by_a_second, state


def test_an_attempt_leaves_the_finished_stage_where_it_is_and_changes_the_recipe(run: Path) -> None:
    before = contents(run)
    begin_again(run, "Count", ["train.steps=300"], {})
    attempt = newest_attempt(run)
    assert attempt is not None and (attempt.stage, attempt.task, attempt.number) == (2, "Count", 2)
    assert attempt.settings == ("train.steps=300",) and open_attempt(run) == attempt
    assert load_run(run).train.steps == 300
    after = contents(run, ("replaced/", "attempt.json"))
    assert {name: text for name, text in after.items() if name != "config.yaml"} == {
        name: text for name, text in before.items() if name != "config.yaml"
    }
    assert (run / "replaced" / "02-Count-1" / "config.yaml").read_text() == before["config.yaml"]
    ids = state(run)["mlflow"]
    assert ids["stages"] == {} and ids["models"] == {}
    assert ids["replaced"] == {"r2": {"label": "02-Count", "model": "m2"}}


def test_the_same_command_resumes_and_another_setting_begins_anew(run: Path) -> None:
    begin_again(run, "Count", ["train.steps=300"], {})
    begun = {"stages": {"02-Count": "r3"}, "models": {}}
    (run / "run.json").write_text(json.dumps({**state(run), "mlflow": {**state(run)["mlflow"], **begun}}))
    first, kept = newest_attempt(run), contents(run)
    begin_again(run, "Count", ["train.steps=300"], {})
    assert newest_attempt(run) == first and contents(run) == kept
    begin_again(run, "Count", ["train.lr_prompt=0.001"], {})
    second = newest_attempt(run)
    assert first is not None and second is not None and (second.number, second.former) == (3, first.former)
    recipe = load_run(run)
    assert (recipe.train.steps, recipe.train.lr_prompt) == (150, 0.001), "from the settings of the finished stage"
    assert [path.name for path in (run / "replaced").iterdir()] == ["02-Count-1"]
    ids = state(run)["mlflow"]
    assert ids["stages"] == {} and ids["replaced"] == {
        "r2": {"label": "02-Count", "model": "m2"},
        "r3": {"label": "", "model": None},
    }, "the stage of other settings is tracked as one of its own"


def test_a_finished_attempt_is_followed_by_a_third(run: Path) -> None:
    replace_by_a_second(run, "train.steps=300")
    assert open_attempt(run) is None
    begin_again(run, "Count", ["train.steps=300"], {})
    third = open_attempt(run)
    assert third is not None and (third.number, third.former) == (3, "02-Count-2")


def test_an_attempt_at_an_earlier_stage_is_history(run: Path) -> None:
    attempts.Attempt(1, "Colours", 2, ("train.steps=300",), "01-Colours-1").write(run)
    (run / "run.json").write_text(json.dumps({**state(run), "status": "stopped"}))
    begin_again(run, "Count", ["train.steps=300"], {})
    opened = open_attempt(run)
    assert opened is not None and (opened.task, opened.number) == ("Count", 2)
    undo(run)
    back = newest_attempt(run)
    assert back is not None and back.task == "Colours"
    undo(run)
    assert newest_attempt(run) == back, "taking back a stage leaves what is said of others"


def test_an_attempt_whose_answers_are_missing_is_not_trained_again(run: Path) -> None:
    replace_by_a_second(run, "train.steps=300")
    (run / "run.json").write_text(json.dumps({**state(run), "status": "stopped"}))
    begin_again(run, "Count", ["train.steps=300"], {})
    assert open_attempt(run) is None


def test_undo_of_an_open_attempt_restores_the_recipe(run: Path) -> None:
    before = contents(run)
    begin_again(run, "Count", ["train.steps=300"], {})
    work = unfinished(run / "stages" / "02-Count")
    work.mkdir()
    (run / "run.json").write_text(
        json.dumps({**state(run), "mlflow": {**state(run)["mlflow"], "stages": {"02-Count": "r3"}}})
    )
    assert undo(run).kind == "attempt"
    assert contents(run) == before and not work.exists()
    ids = state(run)["mlflow"]
    assert ids["stages"] == {"02-Count": "r2"} and ids["models"] == {"Count": "m2"}
    assert ids["replaced"] == {"r3": {"label": "", "model": None}}, "what the dropped attempt tracked is marked"
    assert state(run)["status"] == "trained", "the matrix is written anew by an evaluation"


def test_undo_of_a_replacement_brings_the_former_stage_back(run: Path) -> None:
    before = contents(run)
    replace_by_a_second(run, "train.steps=300")
    found = undo(run)
    assert (found.kind, found.aside) == ("replacement", "02-Count-2")
    assert contents(run, ("replaced/",)) == before
    kept = run / "replaced" / "02-Count-2"
    assert (kept / "stage" / "prompts.safetensors").read_text() == "Count learned with ('train.steps=300',)"
    assert (kept / "matrix.json").read_text() == "another matrix"
    assert yaml.safe_load((kept / "config.yaml").read_text())["train"]["steps"] == 300


def test_undo_of_the_last_stage_leaves_a_run_without_it(run: Path) -> None:
    before = contents(run)
    assert undo(run).kind == "stage"
    assert [task.name for task in load_run(run).data.tasks] == ["Colours"]
    kept = contents(run / "replaced" / "02-Count-1")
    assert kept["stage/prompts.safetensors"] == "Count learned once" and kept["matrix.json"] == "a matrix"
    assert {name for name in kept if name.startswith("eval/")} == {
        f"eval/{name}/Count.jsonl" for name in ("after-02", "told-02", "held-out-02", "ahead-02")
    }
    left = contents(run, ("replaced/", "config.yaml"))
    assert left == {name: before[name] for name in left} and set(left) >= {"stages/01-Colours/meta.json"}
    assert not any("02" in name for name in left) and "matrix.json" not in left
    told = state(run)
    assert (told["stages"], told["stage"], list(told["data"])) == (["Colours"], 1, ["Colours"])
    assert told["mlflow"]["replaced"] == {"r2": {"label": "", "model": "m2"}}
    with pytest.raises(UserError, match="has one task, Colours"):
        undo(run)


def test_the_gate_of_a_stage_that_was_taken_back_goes_with_it(run: Path) -> None:
    recipe = load_run(run)
    path = run / "config.yaml"
    gated = recipe.method.changed({"gate": 0.3}, 1)
    recipe.model_copy(update={"method": gated}).dump_yaml(path)
    undo(run)
    assert load_run(run).method == recipe.method


@pytest.mark.parametrize("kind", ["attempt", "replacement", "stage"])
def test_an_undo_that_was_killed_anywhere_is_completed_by_the_next(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "attempt":
        begin_again(run, "Count", ["train.steps=300"], {})
    elif kind == "replacement":
        replace_by_a_second(run, "train.steps=300")

    def call(copy: Path) -> None:
        if kind == "stage" and len(load_run(copy).data.tasks) == 1 and not (copy / UNDO).exists():
            return  # it was complete but for nothing
        undo(copy)

    renames = after_a_kill_anywhere(monkeypatch, made(tmp_path, run), call)
    assert renames >= 3


def test_a_former_stage_is_put_aside_whole_after_a_kill_anywhere(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_again(run, "Count", ["train.steps=300"], {})
    assert (
        after_a_kill_anywhere(monkeypatch, made(tmp_path, run), lambda copy: put_aside(copy, 2, "Count", "02-Count-1"))
        >= 4
    )


def test_what_cannot_be_replaced_is_refused(run: Path) -> None:
    names = ["Colours", "Count"]
    with pytest.raises(UserError, match=r"has no task Cuont .*Did you mean 'Count'"):
        require_last(run, names, "Cuont")
    with pytest.raises(UserError, match=r"Colours is not the last task of .*, that is Count"):
        require_last(run, names, "Colours")
    with pytest.raises(UserError, match=r"--set train\.budget: a further attempt changes how the stage is trained"):
        prepare_addition(run, "Count", run, None, ["train.budget=500"])
    with pytest.raises(UserError, match=r"--set train\.lr_promt: .*Did you mean 'train\.lr_prompt'"):
        prepare_addition(run, "Count", run, None, ["train.lr_promt=1"])
    with pytest.raises(UserError, match="With the same settings, data and seed Count would be learned as it was"):
        prepare_addition(run, "Count", run, None, [])
    (run / "stages" / "02-Count" / "COMPLETE").unlink()
    with pytest.raises(UserError, match=r"The stage of Count in .* is not finished, so there is nothing to replace"):
        prepare_addition(run, "Count", run, None, [])
    (run / "stages" / "01-Colours" / "COMPLETE").unlink()
    with pytest.raises(UserError, match=r"Stage 1 \(Colours\) of .* is not finished, so Count was not added yet"):
        undo(run)


def test_a_run_in_use_is_not_touched(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "WAIT_S", 0.0)
    monkeypatch.setattr(FileLock, "acquire", lambda self: False)  # a process holds no lock against itself
    before = contents(run)
    for call in (lambda: undo(run), lambda: begin_again(run, "Count", ["train.steps=300"], {})):
        with pytest.raises(UserError, match="is in use by"):
            call()
    assert contents(run) == before


def test_a_run_that_is_half_undone_takes_no_task(run: Path) -> None:
    (run / "undo.json").touch()
    with pytest.raises(UserError, match=r"was interrupted; `python -m pipeline undo .*` completes it"):
        prepare_addition(run, "Count", run, None, [])


def test_a_damaged_attempt_is_said(run: Path) -> None:
    (run / "attempt.json").write_text("{}")
    with pytest.raises(UserError, match=r"attempt\.json cannot be read \(KeyError"):
        attempts.newest_attempt(run)
