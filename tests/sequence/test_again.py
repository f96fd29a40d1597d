"""A further attempt at the last stage, and `undo`: what is in the run's folder, also after a kill at any point."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.load import load_recipe, load_run
from pipeline.errors import UserError
from pipeline.files.lock import FileLock
from pipeline.runs import attempts, lock
from pipeline.runs.attempts import newest_attempt, open_attempt, put_aside
from pipeline.runs.layout import UNDO, unfinished
from pipeline.sequence.add_task import prepare_addition
from pipeline.sequence.again import begin_again, require_last
from pipeline.sequence.undo import undo

RUN_IDS = {"experiment": "1", "parent": "p", "stages": {"02-Count": "r2"}, "models": {"Count": "m2"}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run of two tasks, as far as these functions read it."""
    run = tmp_path / "run"
    run.mkdir()
    load_recipe("nano", ["data.tasks=[Colours, Count]", f"run_dir={run}", "train.steps=150"]).dump_yaml(
        run / "config.yaml"
    )
    for number, task in enumerate(("Colours", "Count"), start=1):
        finish(run / "stages" / f"{number:02d}-{task}", f"{task} learned once")
    for name in ("after-01", "after-02", "told-02", "held-out-02", "ahead-02"):
        answers = run / "eval" / name
        answers.mkdir(parents=True)
        (answers / "Count.jsonl").write_text(f"{name} once")
    (run / "matrix.json").write_text("a matrix")
    state = {"status": "done", "stage": 2, "stages": ["Colours", "Count"], "data": {"Colours": {}, "Count": {}}}
    (run / "run.json").write_text(json.dumps({**state, "mlflow": RUN_IDS}))
    return run


def finish(folder: Path, content: str, **meta: Any) -> None:
    """A finished stage's folder."""
    folder.mkdir(parents=True)
    (folder / "prompts.safetensors").write_text(content)
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "COMPLETE").touch()


def contents(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """All files by their path in a folder, with their text, without locks, the state and what is put aside."""
    left_out = ("LOCK", "run.json", *without)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_text() for name, path in sorted(files.items()) if not name.startswith(left_out)}


def state(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "run.json").read_text()))


def replace_by_a_second(run: Path, *settings: str) -> None:
    """What training does of a further attempt: it makes a stage, and puts the former one aside."""
    begin_again(run, "Count", settings, {})
    attempt = newest_attempt(run)
    assert attempt is not None
    put_aside(run, 2, "Count", attempt.former)
    finish(run / "stages" / "02-Count", f"Count learned with {settings}", **attempt.facts)
    (run / "eval" / "after-02").mkdir()
    (run / "eval" / "after-02" / "Count.jsonl").write_text("after-02 again")
    (run / "matrix.json").write_text("another matrix")


def killed_at_each_replacement(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have the rename with this number (from 0) of all that follow raise, as if the process had been killed there."""
    real, left = os.replace, [number]

    def replace(source: Any, target: Any) -> None:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


def after_a_kill_anywhere(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], Path], call: Callable[[Path], Any]
) -> int:
    """Kill the call at every rename, repeat it, and compare with a call that was not killed; returns the renames."""
    whole = make()
    call(whole)
    wanted = contents(whole)
    for number in range(100):
        run = make()
        with monkeypatch.context() as patched:
            killed_at_each_replacement(patched, number)
            try:
                call(run)
            except KeyboardInterrupt:
                patched.undo()
            else:
                return number
        call(run)
        assert contents(run) == {name: text.replace(str(whole), str(run)) for name, text in wanted.items()}, (
            f"killed at rename {number}"
        )
    raise AssertionError("there is no end of renames")


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


def made(tmp_path: Path, run: Path) -> Callable[[], Path]:
    """Copies of a run, each in a folder of its own."""
    numbers = iter(range(1000))

    def copy() -> Path:
        target = tmp_path / f"copy{next(numbers):04d}"
        shutil.copytree(run, target)
        return target

    return copy


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
