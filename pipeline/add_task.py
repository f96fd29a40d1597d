"""One more task for a run that is there: prepared, and written into the run's recipe as its next stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.config import Recipe, TaskConfig, load_run
from pipeline.errors import UserError, nearest

TASK_FILE = "task.json"  # beside train.json and test.json: how the task is scored


def add_task(run: Path, name: str, root: Path) -> dict[str, Any]:
    """Prepare task `name` of the CoIN folder `root` and append it to the run's recipe; what is trained stays as it is.

    Called again it goes on. Raises UserError for a method without further stages, a run that is not finished, and data
    that cannot be used.
    """
    recipe = load_run(run)
    if recipe.method.name in ("joint", "zero_shot"):
        raise UserError(f"{run} was made with method {recipe.method.name}, which has no next stage; expected another.")
    task = _task(root, name)
    names = [known.name for known in recipe.data.tasks]
    if name in names[:-1]:
        raise UserError(f"{run} has learned the task {name} already; choose another name for a new task.")
    if name not in names:
        _require_finished(run, recipe)
    from data_prep.prepare import prepare

    # The new task may lie elsewhere than the others, which are prepared already.
    changes = {"source": "coin", "root": str(root), "tasks": (task,)}
    prepared = prepare(recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)}))
    if name not in names:
        tasks = (*recipe.data.tasks, task)
        data = recipe.data.model_copy(update={"tasks": tasks, "prepare_first": False})
        # What was counted over the tasks so far is counted anew.
        (run / "eval" / "majority.json").unlink(missing_ok=True)
        recipe.model_copy(update={"data": data}).dump_yaml(run / "config.yaml")
    return {"run": str(run), "task": name, "stage": len({*names, name}), "splits": prepared["splits"]}


def _task(root: Path, name: str) -> TaskConfig:
    """How the task is scored, as `new-task` wrote it beside the data; a folder without it is scored exactly."""
    folder = root / "instructions" / name
    if not folder.is_dir():
        there = sorted(path.name for path in (root / "instructions").glob("*/"))
        known = ", ".join(there) or "none"
        raise UserError(
            f"{folder} does not exist (tasks there: {known}); expected a task that `python -m pipeline new-task` made."
            + nearest(name, there)
        )
    try:
        fields = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
        return TaskConfig.model_validate({**fields, "name": name})
    except FileNotFoundError:
        return TaskConfig(name=name)
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{folder / TASK_FILE} is not as `new-task` writes it ({first}); mend or remove it.") from None


def _require_finished(run: Path, recipe: Recipe) -> None:
    from pipeline.checkpoint import load_stage

    for index, task in enumerate(recipe.data.tasks):
        if load_stage(run, index, task.name) is None:
            raise UserError(
                f"stage {index + 1} ({task.name}) of {run} is not finished; let `python -m pipeline run "
                f"{run / 'config.yaml'}` finish first."
            )
