"""What a prepared split was made from, as dataset.json keeps it, and whether that is what a recipe wants.

`settings` are the fields of a recipe that decide on a split's content, `records` how many the source has before the
limit, `source_files` size, time of change and hash of the text files that were read. Splits that were prepared by
earlier versions lack all three.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.files.atomic import sha256

SETTINGS, RECORDS, SOURCE_FILES = "settings", "records", "source_files"
LIMIT = "limit"
# Names of the fields in a recipe, for messages; other settings are called as they are.
FIELDS = {LIMIT: "limit", "repeated_ids": "data.repeated_ids", "seed": "data.seed", "shots": "data.shots"}
REMEDY = (
    "Leave data.prepared out of the recipe (the default is a folder of its own for these settings), name another one, "
    "or rewrite this one with `python -m pipeline prepare RECIPE --replace`."
)


@dataclass(frozen=True)
class Origin:
    """What a split is made from; see the module."""

    fingerprint: str  # of the source: text files, limit, and size and time of change of the images
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: int | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by path relative to the root

    def facts(self) -> dict[str, Any]:
        """What dataset.json keeps beside `source_fingerprint`."""
        return {SETTINGS: dict(self.settings), RECORDS: self.records, SOURCE_FILES: dict(self.files)}


def file_state(path: Path) -> dict[str, Any]:
    """Size, time of change and hash of a text file of a source."""
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256(path)}


def other_settings(description: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """A clause naming the first setting of a split that differs from the recipe's; None where none does.

    A smaller limit does not differ, since a run then uses the first samples only; a larger one does unless the source
    has no more records. Nothing is known of a split without settings, which an earlier version prepared.
    """
    recorded = description.get(SETTINGS)
    if not recorded:
        return None
    for name, value in wanted.items():
        if name != LIMIT and name in recorded and recorded[name] != value:
            return f"was made with {FIELDS.get(name, name)} {_shown(recorded[name])}, the recipe has {_shown(value)}"
    first, records, limit = recorded.get(LIMIT), description.get(RECORDS), wanted.get(LIMIT)
    if first is None or (records is not None and records <= first) or (limit is not None and limit <= first):
        return None
    return f"holds the first {first} of {records} records, the recipe wants {limit or 'all'}"


def changed_files(description: Mapping[str, Any], root: Path) -> list[str]:
    """The text files of a split's source under `root` that are not what they were; empty where the source is gone.

    Hashed are only files whose size is the same and whose time of change is not.
    """
    recorded: Mapping[str, Mapping[str, Any]] = description.get(SOURCE_FILES) or {}
    if not any((root / name).is_file() for name in recorded):
        return []
    return [name for name, state in recorded.items() if not _is_same(root / name, state)]


def _is_same(path: Path, state: Mapping[str, Any]) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    if status.st_size != state["size"]:
        return False
    return status.st_mtime_ns == state["mtime_ns"] or sha256(path) == state["sha256"]


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Eight letters that name settings; fields at their defaults should be left out, so that new ones change none."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def folder_label(root: str) -> str:
    """What a folder of prepared data is called after: the last part of its source's folder."""
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in Path(root).name)
    return name.strip("._-") or "data"


def shared_or_each(by_name: Mapping[str, Mapping[str, Any]]) -> Any:
    """Settings by name as one value: those that all have, so that a part of the names in any order gives the same."""
    values = list(by_name.values())
    if all(value == values[0] for value in values):
        return values[0] if values else {}
    return {name: dict(by_name[name]) for name in sorted(by_name)}


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
