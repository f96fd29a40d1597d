"""A further attempt at the last stage of a run, with other settings: `add --again` opens it, and `run` trains it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.load import as_recorded, load_recipe, load_run
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError, nearest
from pipeline.files.atomic import replacing
from pipeline.files.paths import command
from pipeline.runs.attempts import (
    NUMBER,
    Attempt,
    complete_replacement,
    finished_meta,
    free_place,
    newest_attempt,
)
from pipeline.runs.layout import ATTEMPT, CONFIG, REPLACED, STATE, stage_folder
from pipeline.runs.lock import locked
from pipeline.runs.replacement import refuse_half_replaced
from pipeline.runs.state import read_state
from pipeline.tracking.replaced import detach

# Fields of `train` that may differ between the stages of a run: they decide how a module is trained, not what it is.
OF_A_STAGE = (
    *("epochs", "steps", "global_batch", "micro_batch", "lr_prompt", "lr_head", "lr_projector", "weight_decay"),
    *("betas", "eps", "schedule", "warmup", "warmup_curve", "clip", "length_buckets", "checkpointing"),
    *("log_every", "save_minutes", "save_steps"),
)


def require_last(run: Path, names: Sequence[str], name: str) -> None:
    """Raise UserError unless the task is the last one of a run with these tasks, and its stage was finished once."""
    if name not in names:
        raise UserError(
            f"{run} has no task {name} (it has {', '.join(names)}); expected --again with its last one, {names[-1]}. "
            f"`{command('add', run, name)}` adds a new one." + nearest(name, names)
        )
    if name != names[-1]:
        raise UserError(
            f"{name} is not the last task of {run}, that is {names[-1]}: later stages were trained behind the module "
            f"of {name}. `{command('undo', run)}` takes back the last one, as often as it is called."
        )
    attempt = newest_attempt(run)
    is_tried_again = attempt is not None and attempt.is_of(len(names) - 1)
    if finished_meta(run, len(names) - 1, name) is None and not is_tried_again:
        raise UserError(
            f"The stage of {name} in {run} is not finished, so there is nothing to replace: "
            f"`{command('run', run / CONFIG)}` continues it, and `{command('undo', run)}` takes it back."
        )


def with_settings(path: Path, settings: Sequence[str], run: Path) -> Recipe:
    """The recipe in a file with settings for a further attempt; UserError for what all stages have in common."""
    allowed = [f"train.{name}" for name in OF_A_STAGE]
    for text in settings:
        field = text.partition("=")[0].strip()
        if field not in allowed:
            raise UserError(
                f"--set {field}: a further attempt changes how the stage is trained, and all stages have the rest in "
                f"common; expected one of {', '.join(allowed)}." + nearest(field, allowed)
            )
    return as_recorded(load_recipe(path, settings), run)


def begin_again(run: Path, name: str, settings: Sequence[str], changes: Mapping[str, Any]) -> None:
    """Open a further attempt at the run's last stage, or find it open with the same settings.

    The recipe is that of the finished stage with the settings. All ranks may call it: the first one writes.

    Args:
        run: the run folder.
        name: the last task.
        settings: values of --set.
        changes: `gate` or `share` of the method from this stage on.

    Raises:
        UserError: settings that cannot be, a run in use by another process, or one whose stages are half replaced.
    """
    said = (*settings, *(f"method.{option}={value:g}" for option, value in changes.items()))
    with locked(run):
        refuse_half_replaced(run)  # which `run` completes, but not beside an attempt that is open
        index = len(load_run(run).data.tasks) - 1
        complete_replacement(run, index, name)
        newest, meta = newest_attempt(run), finished_meta(run, index, name)
        attempt = newest if newest is not None and newest.is_of(index) else None
        is_open = attempt is not None and (meta is None or attempt.replaces(meta))
        if attempt is not None and attempt.settings == said and (is_open or read_state(run).get("status") != "done"):
            return  # the same command resumes
        if attempt is not None and is_open:
            former, number = attempt.former, attempt.number + 1
        else:
            former = free_place(run, index + 1, name)
            number = int((meta or {}).get(NUMBER, 1)) + 1
        place = run / REPLACED / former
        base = place / CONFIG if is_open else run / CONFIG
        recipe = with_settings(base, settings, run)
        recipe = recipe.model_copy(update={"method": recipe.method.changed(changes, index)})
        label = stage_folder(run, index, name).name
        if is_open:
            detach(run, label, name, place.with_name(f"attempt-{number - 1}"), at_once=True, keep=False)
        else:
            place.mkdir(parents=True)
            keep_of_its_time(run, place)
            detach(run, label, name, place, at_once=False)
        recipe.dump_yaml(run / CONFIG)
        Attempt(index + 1, name, number, said, former).write(run)


def keep_of_its_time(run: Path, place: Path) -> None:
    """Copy what describes a run that is about to change to a folder of `replaced`; what is there already stays."""
    for name in (STATE, CONFIG, ATTEMPT):  # run.json beside config.yaml says that this is a run's recipe
        if (run / name).is_file() and not (place / name).is_file():
            copied(run / name, place / name)


def copied(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    with replacing(target) as temporary:
        shutil.copyfile(source, temporary)
