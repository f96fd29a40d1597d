"""The folder of a run of two tasks as far as attempts and `undo` read it, and what training does to it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import load_recipe
from pipeline.runs.attempts import newest_attempt, put_aside
from pipeline.sequence.again import begin_again

RUN_IDS = {"experiment": "1", "parent": "p", "stages": {"02-Count": "r2"}, "models": {"Count": "m2"}}


def two_stages(run: Path) -> Path:
    """The folder of a finished run of two tasks, as far as these functions read it."""
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
    (folder / "COMPLETE").write_text(f"checksum of {content}")


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


def made(tmp_path: Path, run: Path) -> Callable[[], Path]:
    """Copies of a run, each in a folder of its own."""
    numbers = iter(range(1000))

    def copy() -> Path:
        target = tmp_path / f"copy{next(numbers):04d}"
        shutil.copytree(run, target)
        return target

    return copy
