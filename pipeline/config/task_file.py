"""task.json beside a task's train.json and test.json: its metric and longest answer, written by `new-task`.

They are the defaults of a recipe that names the task; `check` reports a recipe with other values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config import registry
from pipeline.config.data import DataConfig
from pipeline.errors import UserError
from pipeline.files.paths import expanded
from pipeline.files.strict_text import load_json

TASK_FILE = "task.json"
ADDED = "coin"  # the data format that `new-task` writes and `add` reads
TAKEN = ("metric", "max_new_tokens")  # fields that a recipe takes from it


def read_task_file(folder: Path) -> dict[str, Any]:
    """The fields of a task's task.json; {} where there is none. Raises UserError for a damaged one."""
    path = folder / TASK_FILE
    try:
        fields = load_json(path.read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UserError as error:
        raise UserError(f"{path}: {error}.") from None
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} is not as `new-task` writes it ({first}); mend or remove it.") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is not as `new-task` writes it (no object); mend or remove it.")
    if registry.is_target(str(fields.get("metric", ""))):
        raise UserError(
            f"{path} names the metric {fields['metric']!r}, which would be imported; expected a metric's name, for the "
            "file may come from somebody else. Name it in the recipe instead if you trust it."
        )
    return fields


def with_task_files(fields: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields, with fields that its tasks lack filled in from their task.json."""
    data = fields.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("root"), str):
        return fields
    source = data.get("source")
    if not isinstance(source, str) or not registry.knows("sources", source):
        return fields  # the field's validation reports it
    form = registry.load("sources", source)
    if form.drawn:
        return fields
    tasks = data.get("tasks")
    if not isinstance(tasks, list):
        return fields
    try:
        root = Path(expanded(data["root"]))
    except UserError:  # the field's validation reports it with the field's name
        return fields
    return {**fields, "data": {**data, "tasks": [_filled(form, root, task) for task in tasks]}}


def _filled(form: Any, root: Path, task: Any) -> Any:
    if not isinstance(task, dict) or not isinstance(task.get("name"), str) or all(name in task for name in TAKEN):
        return task
    there = read_task_file(form.task_folder(root, task["name"]))
    return {**{name: there[name] for name in TAKEN if name in there}, **task}


def contradictions(data: DataConfig) -> list[str]:
    """The fields of a recipe's tasks that differ from their task.json, as clauses for a message."""
    if data.drawn:
        return []
    found = []
    for task in data.tasks:
        there = read_task_file(registry.load("sources", data.source).task_folder(Path(data.root), task.name))
        for name in TAKEN:
            if name in there and there[name] != getattr(task, name):
                found.append(f"{task.name}: {name} {getattr(task, name)}, {TASK_FILE} says {there[name]}")
    return found
