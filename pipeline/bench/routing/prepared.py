"""Keys of prepared tasks, for `bench routing --prepared`: `<folder>/<task>/{train,test}` as `prepare` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.bench.routing.probe import TaskKeys
from pipeline.data.key_file import IDENTITY_FIELDS
from pipeline.data.keys import Keys
from pipeline.data.shards import DATASET_FILE, IndexedShards
from pipeline.errors import UserError

SPLITS = ("train", "test")


def prepared_keys(folders: Sequence[Path]) -> list[TaskKeys]:
    """The keys of all tasks in the folders, as one sequence; of equal names each gets its folder's in front.

    Raises UserError for a folder without prepared tasks, an incomplete split, and keys of different CLIPs.
    """
    found = [(folder, task) for folder in _each_once(folders) for task in _tasks(folder)]
    names = [task.name for _, task in found]
    labels = [
        task.name if names.count(task.name) == 1 else f"{_label(folder, folders)}/{task.name}" for folder, task in found
    ]
    tasks = [_keys(label, task) for label, (_, task) in zip(labels, found, strict=True)]
    _require_one_clip(tasks)
    if len(tasks) < 2:
        raise UserError(
            f"{folders[0]} holds one task, '{tasks[0].name}'; routing needs at least two. Name another folder of "
            "prepared tasks behind it."
        )
    return tasks


def _each_once(folders: Sequence[Path]) -> list[Path]:
    known: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in known:
            raise UserError(f"{folder} is named twice; expected every folder of prepared tasks once.")
        known[folder.resolve()] = folder
    return list(folders)


def _tasks(folder: Path) -> list[Path]:
    """The folders of the tasks in a folder of prepared data."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}; expected one that `python -m pipeline prepare RECIPE` wrote.")
    found = sorted(path for path in folder.iterdir() if _is_task(path))
    if found:
        return found
    above = next((path.parent for path in (folder, folder.parent) if _is_task(path)), None)
    below = next((path.parents[2] for path in sorted(folder.glob(f"*/*/*/{DATASET_FILE}"))), None)
    meant = above or below
    raise UserError(
        f"{folder} holds no prepared tasks; expected <task>/train/{DATASET_FILE} and <task>/test/{DATASET_FILE} in it, "
        "as `python -m pipeline prepare RECIPE` writes them." + (f" Did you mean {meant}?" if meant else "")
    )


def _is_task(folder: Path) -> bool:
    return any((folder / split / DATASET_FILE).is_file() for split in SPLITS)


def _label(folder: Path, folders: Sequence[Path]) -> str:
    """The shortest end of a folder's path that no other of the folders has."""
    others = [other.resolve().parts for other in folders if other.resolve() != folder.resolve()]
    parts = folder.resolve().parts
    for length in range(1, len(parts) + 1):
        if all(other[-length:] != parts[-length:] for other in others):
            return "/".join(parts[-length:])
    return str(folder)


def _keys(name: str, task: Path) -> TaskKeys:
    train, test = (IndexedShards(task / split).keys() for split in SPLITS)
    for split, keys in zip(SPLITS, (train, test), strict=True):
        if not len(keys.text):
            raise UserError(f"{task / split} has no samples; routing is fitted on training and measured on test ones.")
    return TaskKeys(name, *(Keys(k.image, k.text, k.has_image, k.identity) for k in (train, test)))


def _require_one_clip(tasks: Sequence[TaskKeys]) -> None:
    first = tasks[0].train
    for task in tasks:
        for split, keys in zip(SPLITS, (task.train, task.test), strict=True):
            for field in IDENTITY_FIELDS:
                if keys.identity.get(field) != first.identity.get(field):
                    raise UserError(
                        f"The keys of {task.name}/{split} come from another CLIP ({keys.identity.get('clip')}) than "
                        f"those of {tasks[0].name}/train ({first.identity.get('clip')}): {field} differs. Prepare all "
                        "tasks with the same section `keys`."
                    )
