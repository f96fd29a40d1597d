"""Further attempts at the last stage of a sequence, and what is put aside for them.

`attempt.json` names the newest attempt. The finished stage stays in its place and answers questions until the stage of
the attempt is whole; then it is moved to `replaced/NN-TASK-K/`, with its answers, its matrix, and the recipe and the
attempt.json of that time. From there `undo` brings it back.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.atomic import remove_folder, sync_folder, write_json
from pipeline.files.paths import command
from pipeline.runs.layout import (
    ATTEMPT,
    COMPLETE,
    EVALUATIONS,
    MATRIX,
    META,
    REPLACED,
    UNDO,
    evaluations_of,
    stage_folder,
    unfinished_folder,
)
from pipeline.runs.replacement import finish_replacement

STAGE = "stage"  # in a folder of `replaced`: the stage
NUMBER, SETTINGS = "attempt", "settings"  # in meta.json of the stage that a further attempt made


@dataclass(frozen=True)
class Attempt:
    """A further attempt at a stage."""

    stage: int  # the stage's number, from 1
    task: str
    number: int  # of the attempt, from 2; meta.json of its stage has it
    settings: tuple[str, ...]  # `a.b=value`, what it has other than the stage before
    former: str  # folder in `replaced` for what it replaces

    def is_of(self, index: int) -> bool:
        """Whether this is an attempt at the stage `index` (0-based)."""
        return index + 1 == self.stage

    def replaces(self, meta: Mapping[str, Any]) -> bool:
        """Whether a finished stage of its number, by its meta.json, is the one that it replaces."""
        return int(meta.get(NUMBER, 1)) < self.number

    @property
    def facts(self) -> dict[str, Any]:
        """What the meta.json of its stage says of it."""
        return {NUMBER: self.number, SETTINGS: list(self.settings)}

    def write(self, run: Path) -> None:
        """Make this the newest attempt of the run."""
        write_json(run / ATTEMPT, asdict(self))


def newest_attempt(run: Path) -> Attempt | None:
    """The newest attempt at a run's last stage, open or not; None where each stage was trained once.

    Raises UserError for a damaged file.
    """
    path = run / ATTEMPT
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
        return Attempt(**{**content, "settings": tuple(content["settings"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); restore it or remove it.") from None


def refuse_half_undone(run: Path) -> None:
    """Raise UserError for a run that an `undo` has changed in part."""
    if (run / UNDO).exists():
        raise UserError(f"An `undo` of {run} was interrupted; `{command('undo', run)}` completes it.")


def finished_meta(run: Path, index: int, task: str) -> dict[str, Any] | None:
    """meta.json of a finished stage (0-based); None where it is not finished. UserError for a damaged one."""
    folder = stage_folder(run, index, task)
    if not (folder / COMPLETE).is_file():
        return None
    try:
        content = json.loads((folder / META).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / META} cannot be read ({type(error).__name__}: {error}); restore it.") from None
    return dict(content)


def open_attempt(run: Path) -> Attempt | None:
    """The attempt whose stage is not finished yet; None where there is none."""
    attempt = newest_attempt(run)
    if attempt is None:
        return None
    meta = finished_meta(run, attempt.stage - 1, attempt.task)
    return attempt if meta is None or attempt.replaces(meta) else None


def complete_replacement(run: Path, index: int, task: str) -> None:
    """Put a stage (0-based) in its place whose process was killed after the former one was put aside.

    Only with the run's lock held: a process that replaces a stage is between these two renames for a moment.
    """
    finish_replacement(unfinished_folder(run, index, task), stage_folder(run, index, task))


def free_place(run: Path, number: int, task: str) -> str:
    """A name in `replaced` that is not taken, for the stage with this number (from 1)."""
    names = (f"{number:02d}-{task}-{taken}" for taken in count(1))
    return next(name for name in names if not (run / REPLACED / name).exists())


def put_aside(run: Path, number: int, task: str, name: str) -> None:
    """Move a stage (from 1) to a folder of `replaced`, last of all, and before it the answers and the matrix.

    After a kill it goes on where it was. For rank 0, with the run's lock held.
    """
    place = run / REPLACED / name
    move(run / MATRIX, place / MATRIX)
    for folder in evaluations_of(number):
        move(run / EVALUATIONS / folder, place / EVALUATIONS / folder)
    move(stage_folder(run, number - 1, task), place / STAGE)


def bring_back(run: Path, number: int, task: str, name: str) -> None:
    """Undo `put_aside`; what has not been moved, or has been brought back already, stays where it is."""
    place = run / REPLACED / name
    move(place / STAGE, stage_folder(run, number - 1, task))
    for folder in evaluations_of(number):
        move(place / EVALUATIONS / folder, run / EVALUATIONS / folder)
    move(place / MATRIX, run / MATRIX)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, in place of one that is at the target; nothing where the source is not there."""
    if not source.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        remove_folder(target)
    os.replace(source, target)
    for folder in {source.parent, target.parent}:
        sync_folder(folder)


def drop_unfinished(run: Path, number: int, task: str) -> None:
    """Remove what the training of a stage (from 1) has left that was not finished."""
    with contextlib.suppress(FileNotFoundError):
        remove_folder(unfinished_folder(run, number - 1, task))


def drop_place(run: Path, name: str) -> None:
    """Remove a folder of `replaced` whose content was brought back."""
    shutil.rmtree(run / REPLACED / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # others are in it
        (run / REPLACED).rmdir()
