"""How a task is scored, as `new-task` wrote it beside the data, is read by every recipe that names the task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.config.load import load_recipe
from pipeline.config.task_file import contradictions
from pipeline.errors import UserError


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    folder = tmp_path / "instructions" / "Shelf"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"name": "Shelf", "metric": "exact_ci", "max_new_tokens": 40}))
    return [f"data.root={tmp_path}", "data.tasks=[{name: Shelf}]"]


def test_a_recipe_that_names_the_task_scores_it_as_its_task_file_says(overrides: list[str]) -> None:
    (task,) = load_recipe("real6_nano", overrides).data.tasks
    assert (task.metric, task.max_new_tokens) == ("exact_ci", 40)


def test_it_is_found_where_the_root_is_a_variable(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELVES", str(tmp_path))
    (task,) = load_recipe("real6_nano", [*overrides, "data.root=$SHELVES"]).data.tasks
    assert (task.metric, task.max_new_tokens) == ("exact_ci", 40)


def test_a_root_in_the_home_of_nobody_is_one_sentence(overrides: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.root: .*home folder of a user that this machine does not know"):
        load_recipe("real6_nano", [*overrides, "data.root=~no-such-user/data"])


def test_what_the_recipe_says_itself_holds_and_the_difference_is_told(overrides: list[str]) -> None:
    recipe = load_recipe("real6_nano", [*overrides, "data.tasks.Shelf.metric=iou"])
    assert recipe.data.tasks[0].metric == "iou" and recipe.data.tasks[0].max_new_tokens == 40
    assert contradictions(recipe.data) == ["Shelf: metric iou, task.json says exact_ci"]


def test_tasks_without_a_task_file_are_as_they_were(tmp_path: Path) -> None:
    recipe = load_recipe("real6_nano", [f"data.root={tmp_path}", "data.tasks=[{name: Shelf}]"])
    assert (recipe.data.tasks[0].metric, recipe.data.tasks[0].max_new_tokens) == ("exact", 16)
    assert contradictions(recipe.data) == []


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_damaged_task_file_is_one_sentence(overrides: list[str], tmp_path: Path, content: str) -> None:
    path = tmp_path / "instructions" / "Shelf" / "task.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"task\.json.*mend or remove it|task\.json: "):
        load_recipe("real6_nano", overrides)
