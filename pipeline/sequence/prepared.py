"""Checks that prepared data matches the recipe: its settings, its limits and the current state of its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.sources.base import source_class, source_split
from data_prep.sources.image_states import resized_images
from pipeline.config.base import PREPARED
from pipeline.config.data import DataConfig, TaskConfig
from pipeline.config.task_file import ADDED
from pipeline.data.origin import REMEDY, SETTINGS, changed_files, other_settings
from pipeline.data.shards import DATASET_FILE, read_description
from pipeline.errors import UserError, UserErrors
from pipeline.files.paths import command
from pipeline.runs.data_use import recorded_fingerprint

SPLITS = ("train", "test")
SOURCE = "source"  # the setting that names the data format


def require_prepared(data: DataConfig, name: str) -> None:
    """Raise UserError, with the command that prepares it, unless every split of the recipe `name` has been prepared."""
    for task in data.tasks:
        for split in SPLITS:
            folder = data.split_path(task.name, split)
            if not (folder / DATASET_FILE).is_file():
                raise UserError(
                    f"task '{task.name}' is not prepared: there is no {folder / DATASET_FILE}; "
                    f"run `{command('prepare', name)}` first.{earlier_folder(data, task.name)}"
                )


def refuse_other_data(data: DataConfig, run: Path) -> None:
    """Raise UserErrors for prepared splits that were made with other settings, or whose source has changed since.

    The run in the folder `run` continues with a split that it has used even if the source changes. The check is cheap
    for data of any size: text files are hashed only where their modification time differs, and images are compared by
    `check` and `prepare`.
    """
    wrong = []
    for task in data.tasks:
        for split in SPLITS:
            folder = data.split_path(task.name, split)
            description = read_description(folder)
            used = recorded_fingerprint(run, task.name, split)
            begun = used is not None and used == description["fingerprint"]
            wrong += other_data(data, task, split, description, source=not begun)
    if wrong:
        raise UserErrors(wrong)


def other_data(
    data: DataConfig,
    task: TaskConfig,
    split: str,
    description: dict[str, Any],
    source: bool = True,
    images: bool = False,
) -> list[str]:
    """Sentences on how a prepared split differs from the recipe; empty where it matches.

    Args:
        data: the recipe's data section.
        task: the task.
        split: train or test.
        description: the content of the split's dataset.json.
        source: compare the source's files too.
        images: compare the size of every image too.
    """
    folder = data.split_path(task.name, split)
    wanted = data.split_settings(task, split)
    if _was_added(data, task, description):
        wanted = {name: value for name, value in wanted.items() if name != SOURCE}
    clause = other_settings(description, wanted)
    if clause is not None:
        return [f"{folder} {clause}. {REMEDY}"]
    if not source or data.drawn:  # generated data depends on the settings alone
        return []
    return _changed(data, task, split, description, images)


def _was_added(data: DataConfig, task: TaskConfig, description: dict[str, Any]) -> bool:
    """Whether `add` has added the task from another root to a run of another data format."""
    made_from = (description.get(SETTINGS) or {}).get(SOURCE)
    there = source_class(data).task_folder(Path(data.root), task.name).is_dir()
    return data.source != ADDED and made_from == ADDED and not there


def earlier_folder(data: DataConfig, task: str) -> str:
    """A sentence naming a folder in which an earlier version prepared a task of that name; empty where there is none.

    Those versions used `data/<recipe's name>`; the folder's name is now a hash of the settings.
    """
    place = Path(data.prepared).parent
    if place.name != Path(PREPARED).parent.name:
        return ""
    found = sorted(place.parent.glob(f"*/{task}/{SPLITS[0]}/{DATASET_FILE}"))
    if not found:
        return ""
    folder = found[0].parents[2]
    return f" {folder} has a prepared task '{task}'; `--set data.prepared={folder}` uses that one if it is the same."


def _changed(data: DataConfig, task: TaskConfig, split: str, description: dict[str, Any], images: bool) -> list[str]:
    folder, root = data.split_path(task.name, split), Path(data.root)
    advice = "Run `python -m pipeline prepare RECIPE` to take the source as it is now."
    if not source_class(data).task_folder(root, task.name).is_dir():
        return []  # the source is on another machine, or was removed after preparation
    if not description.get(SETTINGS):
        return _changed_before(data, task, split, description, advice)
    changed = changed_files(description, root)
    if changed:
        return [f"{folder} was prepared before {root / changed[0]} changed. {advice}"]
    if images:
        resized = resized_images(folder, source_class(data).image_roots(root))
        if resized:
            more = f" and {len(resized) - 1} more images" if len(resized) > 1 else ""
            return [f"{folder} was prepared before {resized[0]}{more} changed. {advice}"]
    return []


def _changed_before(
    data: DataConfig, task: TaskConfig, split: str, description: dict[str, Any], advice: str
) -> list[str]:
    """`_changed` for a split of an earlier version: compares the source's fingerprint with and without the limit."""
    try:
        source = source_split(data, task, split)
        taken = description["count"] + len(description.get("skipped", []))
        enough = {source.limit, None}
        if taken >= (source.limit or len(source.with_limit(None))):
            enough.add(taken)
        if any(source.with_limit(limit).fingerprint() == description.get("source_fingerprint") for limit in enough):
            return []
    except UserError:  # an unreadable source does not make the prepared data unusable
        return []
    folder, count = data.split_path(task.name, split), description["count"]
    return [
        f"{folder} ({count} samples, of an earlier version) was prepared from another state of {data.root}, or with "
        f"another limit. {advice}"
    ]
