"""Takes back the last `add` of a run: an attempt that is open, a stage that replaced another, or the last stage.

What is taken back is put aside in `replaced`, not removed. `undo.json` says what is done while it is, so that a call
after a kill completes it; until then the run is neither trained nor evaluated.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config.load import load_recipe, load_run
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.files.atomic import write_json
from pipeline.files.paths import command
from pipeline.methods import make_method
from pipeline.runs.attempts import (
    STAGE,
    bring_back,
    complete_replacement,
    drop_place,
    drop_unfinished,
    finished_meta,
    free_place,
    move,
    newest_attempt,
    put_aside,
)
from pipeline.runs.layout import (
    ATTEMPT,
    COMPLETE,
    CONFIG,
    EVALUATIONS,
    REPLACED,
    STATE,
    UNDO,
    ahead_folder,
    stage_folder,
)
from pipeline.runs.lock import locked
from pipeline.runs.state import read_state
from pipeline.sequence.again import copied, keep_of_its_time
from pipeline.tracking.replaced import attach, detach


@dataclass(frozen=True)
class Undo:
    """What is taken back.

    `kind` is attempt (it is not finished), replacement (the former stage comes back) or stage (the run has one less).
    """

    kind: Literal["attempt", "replacement", "stage"]
    number: int  # of the stage, from 1
    task: str
    former: str  # folder in `replaced` of what comes back; "" for a stage
    aside: str  # folder in `replaced` of what is taken back; "" for an attempt
    has_moved: bool = False  # whether all of it is there, so that bringing back may begin

    @property
    def sentence(self) -> str:
        """What was done, for the terminal."""
        if self.kind == "attempt":
            return f"the attempt to learn {self.task} again was dropped; the finished stage was never replaced."
        if self.kind == "replacement":
            return (
                f"{self.task} is as it was before it was learned again; the later stage is in {REPLACED}/{self.aside}."
            )
        return f"{self.task} was taken back; its stage and answers are in {REPLACED}/{self.aside}."


def undo(run: Path) -> Undo:
    """Take back the last `add` of a run, or complete an earlier call; `evaluate_run` then writes the matrix anew.

    Raises:
        UserError: there is nothing to take back, or the run is in use by another process.
    """
    recipe = load_run(run)
    if not make_method(recipe.method).has_next_stage:
        raise UserError(f"{run} was made with method {recipe.method.name}, which has one stage for all tasks.")
    with locked(run):
        found = _begun(run) or _planned(run, recipe)
        write_json(run / UNDO, asdict(found))
        label, place = stage_folder(run, found.number - 1, found.task).name, run / REPLACED / found.former
        drop_unfinished(run, found.number, found.task)
        if found.kind != "attempt" and not found.has_moved:
            _put_aside(run, found, label)
            write_json(run / UNDO, {**asdict(found), "has_moved": True})
        if found.kind != "stage":
            attach(run, label, found.task, place)
            bring_back(run, found.number, found.task, found.former)
            (run / ATTEMPT).unlink(missing_ok=True)
            for name in (ATTEMPT, CONFIG):
                if (place / name).is_file():
                    copied(place / name, run / name)
        else:
            attempt = newest_attempt(run)
            if attempt is not None and attempt.is_of(found.number - 1):  # not one at an earlier stage
                (run / ATTEMPT).unlink()
            _without_last(load_recipe(run / REPLACED / found.aside / CONFIG)).dump_yaml(run / CONFIG)
        _write_state(run, found)
        (run / UNDO).unlink()
        if found.kind != "stage":
            drop_place(run, found.former)
    return found


def _begun(run: Path) -> Undo | None:
    """What an earlier call that was killed has begun."""
    with contextlib.suppress(FileNotFoundError):
        try:
            return Undo(**json.loads((run / UNDO).read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{run / UNDO} cannot be read ({error}); restore it.") from None
    return None


def _planned(run: Path, recipe: Recipe) -> Undo:
    names = [task.name for task in recipe.data.tasks]
    number, name = len(names), names[-1]
    for index, task in enumerate(names[:-1]):
        if finished_meta(run, index, task) is None:
            raise UserError(
                f"Stage {index + 1} ({task}) of {run} is not finished, so {name} was not added yet; "
                f"`{command('run', run / CONFIG)}` goes on with it. To begin anew, choose another run_dir."
            )
    attempt = newest_attempt(run)
    if attempt is not None and attempt.is_of(number - 1):
        complete_replacement(run, number - 1, name)
        meta = finished_meta(run, number - 1, name)
        if meta is not None and attempt.replaces(meta):
            return Undo("attempt", number, name, attempt.former, "")
        if (run / REPLACED / attempt.former / STAGE / COMPLETE).is_file():
            return Undo("replacement", number, name, attempt.former, free_place(run, number, name))
    if number == 1:
        raise UserError(f"{run} has one task, {name}, and no run is left without it; remove the folder instead.")
    return Undo("stage", number, name, "", free_place(run, number, name))


def _put_aside(run: Path, found: Undo, label: str) -> None:
    """Move what is taken back, with the recipe and the attempt.json of its time."""
    place = run / REPLACED / found.aside
    place.mkdir(parents=True, exist_ok=True)
    keep_of_its_time(run, place)
    detach(run, label, found.task, place, at_once=True)
    if found.kind == "stage":
        ahead = ahead_folder(run, found.number)
        move(ahead, place / EVALUATIONS / ahead.name)
    put_aside(run, found.number, found.task, found.aside)


def _without_last(recipe: Recipe) -> Recipe:
    """The recipe without its last task, with the gate and share of the stages before."""
    stages, method = len(recipe.data.tasks) - 1, recipe.method
    then = method.after(stages)
    if hasattr(method, "earlier_gates"):
        kept = tuple(earlier for earlier in method.earlier_gates if earlier.stages < stages)
        then = then.model_copy(update={"earlier_gates": kept})
    data = recipe.data.model_copy(update={"tasks": recipe.data.tasks[:-1]})
    return recipe.model_copy(update={"data": data, "method": then})


def _write_state(run: Path, found: Undo) -> None:
    """Have run.json say that all stages are trained, which `evaluate` then completes."""
    state: dict[str, Any] = read_state(run)
    stages = [task.name for task in load_run(run).data.tasks]
    state |= {"status": "trained", "stage": len(stages), "stages": stages}
    if found.kind == "stage":
        for entries in (state.get("data"), state.get("left_out")):
            if isinstance(entries, dict):
                entries.pop(found.task, None)
    write_json(run / STATE, state)
