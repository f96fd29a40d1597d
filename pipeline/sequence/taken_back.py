"""What `undo` has taken back and kept in `replaced`: which of it fits the run as it is now, and can be brought back.

A stage was trained behind the stages before it, so it fits as long as these are the same. Their files COMPLETE say so:
each has the checksum of its meta.json, which has that of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.files.atomic import write_json
from pipeline.runs.attempts import STAGE, open_attempt
from pipeline.runs.layout import COMPLETE, REPLACED, STAGES, stage_folder

TAKEN_BACK = "taken_back.json"  # in the folder of what was taken back


@dataclass(frozen=True)
class TakenBack:
    """A stage that was taken back."""

    number: int  # from 1
    task: str
    order: int  # the later it was taken back, the higher
    left: dict[str, str]  # finished stages that the run had then, by folder: content of COMPLETE


def mark(run: Path, number: int, task: str, aside: str, former: str) -> None:
    """Note in `aside` that a stage (from 1) is taken back and `former` comes back, "" for nothing; a note stays.

    A stage that is not finished gets no note. For rank 0, with the run's lock held, before anything is moved.
    """
    label, note = stage_folder(run, number - 1, task).name, run / REPLACED / aside / TAKEN_BACK
    left = finished_stages(run)
    if note.is_file() or left.pop(label, None) is None:
        return
    if former:
        left[label] = (run / REPLACED / former / STAGE / COMPLETE).read_text("utf-8")
    order = 1 + max((known.order for _, known in _notes(run)), default=0)
    write_json(note, asdict(TakenBack(number, task, order, left)))


def kept(run: Path, names: Sequence[str], task: str) -> str | None:
    """The folder in `replaced` of the stage of this task that was taken back last and fits the run; None without one.

    Args:
        run: the run folder.
        names: the run's tasks. Of the last one a further attempt is looked for, of one that is missing its stage.
        task: the name.
    """
    if task in names[:-1] or open_attempt(run) is not None:
        return None
    number, now = len(names) + (task not in names), finished_stages(run)
    found = [
        (known.order, place)
        for place, known in _notes(run)
        if (known.number, known.task, known.left) == (number, task, now) and len(now) == len(names)
    ]
    return max(found)[1] if found else None


def kept_tasks(run: Path, names: Sequence[str]) -> list[str]:
    """The tasks of which something can be brought back to a run with these tasks."""
    return [task for task in sorted({known.task for _, known in _notes(run)}) if kept(run, names, task) is not None]


def finished_stages(run: Path) -> dict[str, str]:
    """The run's finished stages by the names of their folders, with the content of COMPLETE."""
    return {path.parent.name: path.read_text("utf-8") for path in sorted((run / STAGES).glob(f"*/{COMPLETE}"))}


def _notes(run: Path) -> Iterator[tuple[str, TakenBack]]:
    """The notes whose stage is there, with the names of their folders; a damaged one counts as none."""
    for path in (run / REPLACED).glob(f"*/{TAKEN_BACK}"):
        with suppress(OSError, ValueError, TypeError):
            known = TakenBack(**json.loads(path.read_text("utf-8")))
            if (path.parent / STAGE / COMPLETE).is_file():
                yield path.parent.name, known
