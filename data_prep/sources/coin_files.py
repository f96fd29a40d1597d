"""Finds the files of a CoIN root: the parts of a split, annotation files, images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.sources.addresses import plain_name
from pipeline.errors import UserError, nearest

INSTRUCTIONS = "instructions"
# In CoIN the test split of some tasks is named val.
STEMS = {"train": ("train",), "test": ("test", "val")}
# CoIN's image paths start at `datasets`.
IMAGE_ROOTS = ("", "datasets")
# Files of annotations beside the benchmarks' test splits, under the names that CoIN's scripts use (docs/design.md 6.1),
# and the tasks they belong to. In a task's own folder, a file of any of these names belongs to that task. In
# `datasets`, which all tasks share, it is read for its own task alone: question ids and image names repeat between
# benchmarks, so another task would get foreign answers.
ANNOTATIONS = {
    "TextVQA_0.5.1_val.json": ("textvqa",),
    "problems.json": ("scienceqa",),
    "testdev_balanced_questions.json": ("gqa",),
    "v2_mscoco_val2014_annotations.json": ("vqav2",),
    "val_coco_type_3000.json": ("vizwiz", "flickr30k"),
}


def split_files(root: Path, task: str, split: str, named: Sequence[str] = ()) -> list[Path]:
    """Return the files of a split.

    These are the named ones, else train.json (test.json, val.json) and its numbered parts, else the only file whose
    name starts with train (test, val). Raises UserError when there is none or the choice is ambiguous.
    """
    folder = _task_folder(root, task)
    if named:
        return [_named(folder, name) for name in named]
    stems = STEMS[split]
    for stem in stems:
        base, parts = folder / f"{stem}.json", _numbered(folder, stem)
        if base.is_file():
            return [base, *parts]
        if parts:
            return parts
    for stem in stems:
        others = [path for path in sorted(folder.glob(f"{stem}[-_.]*.json")) if path.name not in ANNOTATIONS]
        if len(others) == 1:
            return others
        if others:
            raise UserError(
                f"The {split} split of task {task!r} could be any of {', '.join(path.name for path in others)} in "
                f"{folder}; name the right ones in the task's {split}_files."
            )
    names = " or ".join(f"{stem}.json" for stem in stems)
    raise UserError(f"Task {task!r} has no {split} file: expected {names} in {folder}. Put it there.")


def annotation_file(root: Path, task: str, named: str | None = None) -> Path | None:
    """Return the annotation file of a task's test questions: the named one, else a known one; None without both.

    Raises UserError when the named one is missing.
    """
    if named is not None:
        if not (root / named).is_file():
            raise UserError(
                f"Task {task!r} names the annotations {named}, and {root / named} does not exist. Put the file there "
                "or leave the field out."
            )
        return root / named
    own = (root / INSTRUCTIONS / task, root / "datasets" / task, root / task)
    candidates = [folder / name for folder in own for name in ANNOTATIONS]
    candidates += [root / "datasets" / name for name, tasks in ANNOTATIONS.items() if plain_name(task) in tasks]
    return next((path for path in candidates if path.is_file()), None)


def _task_folder(root: Path, task: str) -> Path:
    instructions = root / INSTRUCTIONS
    if not instructions.is_dir():
        raise UserError(
            f"{root} has no folder instructions: it is no CoIN root. Set data.root to the folder that holds "
            "instructions/<Task>/train.json and test.json."
        )
    if not (instructions / task).is_dir():
        tasks = sorted(path.name for path in instructions.iterdir() if path.is_dir())
        raise UserError(
            f"{instructions} has no task {task!r}; it has {', '.join(tasks) or 'none'}.{nearest(task, tasks)}"
        )
    return instructions / task


def _named(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        names = sorted(path.name for path in folder.glob("*.json"))
        raise UserError(f"{folder} has no file {name!r}; it has {', '.join(names) or 'none'}.{nearest(name, names)}")
    return folder / name


def _numbered(folder: Path, stem: str) -> list[Path]:
    """The parts of a split, such as `<stem>-1.json` or `<stem>_00000-of-00003.json`, in the order of their numbers."""
    pattern = re.compile(rf"{stem}[-_.](\d+)(?:[-_]of[-_]\d+)?\.json")
    found = ((pattern.fullmatch(path.name), path) for path in folder.glob(f"{stem}*.json"))
    return [path for _, path in sorted((int(match.group(1)), path) for match, path in found if match)]
