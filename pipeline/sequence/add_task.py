"""Add a task to an existing run: prepare it, and append it to the run's recipe as the next stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.data import TaskConfig
from pipeline.config.load import load_run
from pipeline.config.recipe import Recipe
from pipeline.config.task_file import ADDED, TASK_FILE, read_task_file
from pipeline.errors import UserError, nearest
from pipeline.files.atomic import replacing
from pipeline.files.paths import command
from pipeline.methods import make_method
from pipeline.runs.attempts import open_attempt, refuse_half_undone
from pipeline.runs.layout import CONFIG, begun_stages
from pipeline.sequence.again import begin_again, require_last, with_settings

if TYPE_CHECKING:
    from pipeline.prompts.stage_files import StageCheckpoint


@dataclass(frozen=True)
class Again:
    """What a further attempt at a stage has other than the one before."""

    settings: Sequence[str] = ()  # values of --set
    changes: Mapping[str, Any] = field(default_factory=dict)  # `gate` or `share`


@dataclass(frozen=True)
class Addition:
    """A prepared task that is not yet part of the run's recipe on disk."""

    run: Path
    recipe: Recipe  # with the task
    task: str
    is_new: bool  # not in the run's recipe already
    again: Again | None = None  # a further attempt at the run's last stage

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Write the recipe with the task for the block that trains it.

        If the block fails before the task's stage has begun, the earlier recipe is restored, and the run is finished
        again with its earlier tasks. A further attempt is opened, and the finished stage stays until it is replaced.
        """
        if self.again is not None:
            begin_again(self.run, self.task, self.again.settings, self.again.changes)
            yield
            return
        path = self.run / CONFIG
        before = path.read_bytes()
        self.recipe.dump_yaml(path)
        try:
            yield
        except BaseException:
            if self.is_new and not begun_stages(self.run, len(self.recipe.data.tasks)):
                with replacing(path) as temporary:
                    temporary.write_bytes(before)
            raise


def prepare_addition(
    run: Path, name: str, root: Path, changes: Mapping[str, Any] | None = None, again: Sequence[str] | None = None
) -> Addition:
    """Prepare a task as the run's next stage; the run itself is not changed. A repeated call resumes the preparation.

    Args:
        run: the run folder.
        name: the task's name.
        root: a folder in CoIN layout with the task.
        changes: `gate` or `share` of the run's method from this stage on; earlier stages keep theirs.
        again: settings of a further attempt at the run's last stage, `a.b=value`; None: a stage that is new.

    Raises:
        UserError: a method without further stages, an unfinished run, or data that cannot be used.
    """
    recipe = load_run(run)
    if not make_method(recipe.method).has_next_stage:
        raise UserError(f"{run} was made with method {recipe.method.name}, which has no next stage; expected another.")
    names = [known.name for known in recipe.data.tasks]
    refuse_half_undone(run)
    if again is not None:
        return _again(run, name, recipe, Again(again, changes or {}))
    task = _task(root, name)
    if name in names[:-1]:
        raise UserError(f"{run} has learned the task {name} already; choose another name for a new task.")
    if name not in names:
        _require_finished(run, names)
        _refuse_open_attempt(run)
    earlier = len(names) - (name in names)
    method = recipe.method.changed(changes or {}, earlier)
    if changes:
        _ = make_method(method).routing  # raises for a share or gate that cannot be
        _require_keys(run, names[:earlier], changes)
    # Imported here: torch and pyarrow take seconds, and errors of the run or the task are reported before.
    from data_prep.prepare import prepare
    from data_prep.split import NotRewritten  # see above

    # The new task may have another root than the others, which are prepared already.
    changes = {"source": ADDED, "root": str(root), "tasks": (task,)}
    try:
        prepare(recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)}))
    except NotRewritten as error:
        raise UserError(f"{error.found} Give the task another name with `new-task`, and add it under that.") from None
    if name not in names:
        tasks = (*recipe.data.tasks, task)
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"tasks": tasks, "prepare_first": False})}
        )
    return Addition(run, recipe.model_copy(update={"method": method}), name, name not in names)


def _again(run: Path, name: str, recipe: Recipe, again: Again) -> Addition:
    """A further attempt at the last stage, whose data is prepared already; UserError where it cannot be."""
    names = [known.name for known in recipe.data.tasks]
    require_last(run, names, name)
    if not again.settings and not again.changes:
        example = command("add", run, name, "--again", "--set", "train.lr_prompt=3e-3")
        raise UserError(
            f"With the same settings, data and seed {name} would be learned as it was; expected what is to differ, as "
            f"in `{example}`."
        )
    recipe = with_settings(run / CONFIG, again.settings, run)
    method = recipe.method.changed(again.changes, len(names) - 1)
    if again.changes:
        _ = make_method(method).routing  # raises for a share or gate that cannot be
        _require_keys(run, names[:-1], again.changes)
    return Addition(run, recipe.model_copy(update={"method": method}), name, False, again)


def _refuse_open_attempt(run: Path) -> None:
    """Raise UserError where the last stage is being trained again, which would then have to end first."""
    attempt = open_attempt(run)
    if attempt is not None:
        raise UserError(
            f"{attempt.task} of {run} is being learned again; let `{command('run', run / CONFIG)}` finish that first, "
            f"or drop it with `{command('undo', run)}`."
        )


def _task(root: Path, name: str) -> TaskConfig:
    """The task's settings from `task.json`, which `new-task` wrote beside the data; defaults without that file."""
    folder = root / "instructions" / name
    if not folder.is_dir():
        there = sorted(path.name for path in (root / "instructions").glob("*/"))
        known = ", ".join(there) or "none"
        raise UserError(
            f"{folder} does not exist (tasks there: {known}); expected a task that `python -m pipeline new-task` made."
            + nearest(name, there)
        )
    try:
        return TaskConfig.model_validate({**read_task_file(folder), "name": name})
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{folder / TASK_FILE} is not as `new-task` writes it ({first}); mend or remove it.") from None


def _require_keys(run: Path, tasks: Sequence[str], changes: Mapping[str, Any]) -> None:
    """Raise UserError for a share where the stages of these tasks keep no routing keys, of which it is computed."""
    from pipeline.prompts.pool import STATE  # torch, see `prepare_addition`
    from pipeline.prompts.routers.kept_keys import TEXT  # see above

    if "share" not in changes:
        return
    if any(stage is not None and STATE + TEXT not in stage.tensors for stage in _stages(run, tasks)):
        first = command("run", run / CONFIG, "--set", "method.unfamiliar=flag")
        raise UserError(
            f"--share compares the probabilities of tasks, and {run} keeps no routing keys to compute them from. "
            f"`{first}` makes them from the prepared data and changes no set; add the task then, or give --gate."
        )


def _stages(run: Path, tasks: Sequence[str]) -> Iterator[StageCheckpoint | None]:
    """What the stages of these tasks left, read one after the other; None for a stage that is not finished."""
    from pipeline.prompts.stage_files import load_stage  # torch, see `prepare_addition`

    return (load_stage(run, index, task) for index, task in enumerate(tasks))


def _require_finished(run: Path, tasks: Sequence[str]) -> None:
    for index, (task, stage) in enumerate(zip(tasks, _stages(run, tasks), strict=True)):
        if stage is None:
            raise UserError(
                f"stage {index + 1} ({task}) of {run} is not finished; let "
                f"`{command('run', run / 'config.yaml')}` finish first."
            )
