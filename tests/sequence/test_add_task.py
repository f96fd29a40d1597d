"""What `add` refuses before it prepares anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep import prepare
from pipeline.config.load import load_recipe
from pipeline.errors import UserError
from pipeline.sequence import add_task


def test_a_gate_for_a_method_without_one_is_refused_before_the_task_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "instructions" / "Mine").mkdir(parents=True)
    monkeypatch.setattr(add_task, "load_run", lambda run: load_recipe("nano_independent"))
    monkeypatch.setattr(add_task, "_require_finished", lambda *_: None)
    monkeypatch.setattr(prepare, "prepare", lambda recipe: pytest.fail("the task was prepared"))
    with pytest.raises(UserError, match="the method independent has no gate"):
        add_task.prepare_addition(tmp_path / "run", "Mine", tmp_path, {"gate": 0.1})
