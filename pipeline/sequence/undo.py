"""Takes back the last `add` of a run: an attempt that is open, a stage that replaced another, or the last stage.

What is taken back is put aside in `replaced`, not removed, and `redo` brings it back. `undo.json` says what is done
while it is, so that a call after a kill completes it; until then the run is neither trained nor evaluated.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.config.load import load_recipe, load_run
from pipeline.config.recipe import OF_HEADS, OF_ROUTING, Recipe
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
    refuse_half_undone,
)
from pipeline.runs.layout import (
    ATTEMPT,
    COMPLETE,
    CONFIG,
    EVALUATIONS,
    REPLACED,
    REPLACING_HEADS,
    REPLACING_ROUTING,
    STATE,
    UNDO,
    ahead_folder,
    stage_folder,
)
from pipeline.runs.lock import locked
from pipeline.runs.state import read_state
from pipeline.sequence.again import copied, keep_of_its_time
from pipeline.sequence.taken_back import kept, mark
from pipeline.tracking.replaced import attach, detach


@dataclass(frozen=True)
class Undo:
    """What is taken back, or brought back.

    `kind` is attempt (it is not finished), replacement (the former stage comes back), stage (the run has one less) or
    return (a stage that was taken back is the last one again).
    """

    kind: Literal["attempt", "replacement", "stage", "return"]
    number: int  # of the stage, from 1
    task: str
    former: str  # folder in `replaced` of what comes back; "" for a stage
    aside: str  # folder in `replaced` of what is taken back; "" for an attempt and a return
    has_moved: bool = False  # whether all of it is there, so that bringing back may begin
    is_finished: bool = True  # whether the stage that is taken back is; of another one nothing is kept
    is_redo: bool = False  # a replacement that `redo` makes: what it puts aside is a former stage

    def sentence(self, run: Path) -> str:
        """What is done, what of it is lost, and how the rest comes back."""
        task, again = self.task, f"`{command('add', run, self.task, '--again')}`"
        if self.kind == "attempt":
            return (
                f"The attempt to learn {task} again is dropped, and what it has trained so far is lost; the finished "
                "stage was never replaced."
            )
        if self.kind == "return":
            return f"{task} is the run's last task again, with the stage and answers that were in {self._in_former}."
        if self.is_redo:
            return (
                f"{task} is as it was before it was taken back; the stage that came back then is in {self._in_aside}, "
                f"and `{command('undo', run)}` brings it back."
            )
        if self.kind == "replacement":
            return (
                f"{task} is as it was before it was learned again; the later stage is in {self._in_aside}. {again} "
                "brings it back as long as no stage has changed."
            )
        if not self.is_finished:
            return f"{task} is taken back. Its stage is not finished, and what it has trained so far is lost."
        return (
            f"{task} is taken back, and the run answers without it; its stage and answers are in {self._in_aside}. "
            f"{again} brings them back as long as no stage has changed and no task was added."
        )

    @property
    def _in_former(self) -> str:
        return f"{REPLACED}/{self.former}"

    @property
    def _in_aside(self) -> str:
        return f"{REPLACED}/{self.aside}"


def foretold_undo(run: Path) -> Undo:
    """What `undo` would do now; changes nothing.

    Raises:
        UserError: there is nothing to take back.
    """
    return _begun(run) or _planned(run, _undoable(run))


def undo(run: Path) -> Undo:
    """Take back the last `add` of a run, or complete an earlier call; `evaluate_run` then writes the matrix anew.

    Raises:
        UserError: there is nothing to take back, or the run is in use by another process.
    """
    recipe = _undoable(run)
    with locked(run):
        found = _begun(run)
        if found is None:
            found = _planned(run, recipe)
            if found.kind == "replacement":
                complete_replacement(run, found.number - 1, found.task)
        _do(run, found)
    return found


def foretold_redo(run: Path, task: str) -> Undo | None:
    """What `redo` would do now; None where nothing of this task was taken back that fits the run. Changes nothing."""
    names = [known.name for known in load_run(run).data.tasks]
    place = kept(run, names, task)
    if place is None:
        return None
    if task not in names:
        return Undo("return", len(names) + 1, task, place, "")
    return Undo("replacement", len(names), task, place, free_place(run, len(names), task), is_redo=True)


def redo(run: Path, task: str) -> Undo | None:
    """Bring back what was taken back of a task last; None, and nothing is done, where nothing of it fits the run.

    Raises:
        UserError: an `undo` was interrupted, or the run is in use by another process.
    """
    with locked(run):
        refuse_half_undone(run)
        found = foretold_redo(run, task)
        if found is not None:
            _do(run, found)
    return found


def _undoable(run: Path) -> Recipe:
    """The recipe of a run whose stages can be taken back; UserError for another one."""
    recipe = load_run(run)
    if not make_method(recipe.method).has_next_stage:
        raise UserError(f"{run} was made with method {recipe.method.name}, which has one stage for all tasks.")
    return recipe


def _do(run: Path, found: Undo) -> None:
    """Move what is taken back and what comes back, with the run's lock held; after a kill it goes on where it was."""
    write_json(run / UNDO, asdict(found))
    label, place = stage_folder(run, found.number - 1, found.task).name, run / REPLACED / found.former
    drop_unfinished(run, found.number, found.task)
    if found.aside and not found.has_moved:
        _put_aside(run, found, label)
        write_json(run / UNDO, {**asdict(found), "has_moved": True})
    if found.former:
        attach(run, label, found.task, place)
        bring_back(run, found.number, found.task, found.former)
        ahead = ahead_folder(run, found.number)
        move(place / EVALUATIONS / ahead.name, ahead)  # of a return; it does not depend on the stage
        (run / ATTEMPT).unlink(missing_ok=True)
        if (place / ATTEMPT).is_file():
            copied(place / ATTEMPT, run / ATTEMPT)
        if (place / CONFIG).is_file():
            _bring_recipe(run, place)
        attempt = newest_attempt(run)
        if found.is_redo and attempt is not None:
            replace(attempt, former=found.aside).write(run)
    else:
        attempt = newest_attempt(run)
        if attempt is not None and attempt.is_of(found.number - 1):  # not one at an earlier stage
            (run / ATTEMPT).unlink()
        _without_last(load_recipe(run / REPLACED / found.aside / CONFIG)).dump_yaml(run / CONFIG)
    _write_state(run, found)
    (run / UNDO).unlink()
    if found.former:
        drop_place(run, found.former)


def _bring_recipe(run: Path, place: Path) -> None:
    """Give the run the recipe of what comes back, but for its present router and answer heads.

    All stages have these in common, and the others have them already: what comes back gets them by the next call that
    trains or evaluates, which goes on where one was killed while it replaced them.
    """
    then, now = load_run(place), load_run(run)
    for marker, fields in ((REPLACING_ROUTING, OF_ROUTING), (REPLACING_HEADS, OF_HEADS)):
        if then.adopting(now.method, fields).method != then.method:
            (run / marker).touch()
    recipe = then.adopting(now.method, then.adopted)
    if recipe.method == then.method:
        copied(place / CONFIG, run / CONFIG)
    else:
        recipe.dump_yaml(run / CONFIG)


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
    meta = finished_meta(run, number - 1, name)
    if attempt is not None and attempt.is_of(number - 1):
        if meta is not None and attempt.replaces(meta):
            return Undo("attempt", number, name, attempt.former, "")
        if (run / REPLACED / attempt.former / STAGE / COMPLETE).is_file():
            return Undo("replacement", number, name, attempt.former, free_place(run, number, name))
    if number == 1:
        raise UserError(f"{run} has one task, {name}, and no run is left without it; remove the folder instead.")
    return Undo("stage", number, name, "", free_place(run, number, name), is_finished=meta is not None)


def _put_aside(run: Path, found: Undo, label: str) -> None:
    """Move what is taken back, with the recipe and the attempt.json of its time."""
    place = run / REPLACED / found.aside
    place.mkdir(parents=True, exist_ok=True)
    keep_of_its_time(run, place)
    if not found.is_redo:
        mark(run, found.number, found.task, found.aside, found.former)
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
    then = read_state(run / REPLACED / found.former) if found.kind == "return" else {}
    for name in ("data", "left_out") if found.kind in ("stage", "return") else ():
        entries, kept_entries = state.get(name), then.get(name)
        if isinstance(entries, dict):
            entries.pop(found.task, None)
            if isinstance(kept_entries, dict) and found.task in kept_entries:
                entries[found.task] = kept_entries[found.task]
    write_json(run / STATE, state)
