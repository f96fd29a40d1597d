"""The origin of a prepared split as recorded in dataset.json, and its comparison with a recipe and a source.

`settings` are the fields of a recipe that determine a split's content, `records` is the number of records in the source
without the limit, `source_files` are size, modification time and hash of the text files that were read. Splits that
earlier versions prepared lack all three.
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
# Names of the recipe's fields for messages, where they differ from those of the settings.
FIELDS = {LIMIT: "limit", "repeated_ids": "data.repeated_ids", "seed": "data.seed", "shots": "data.shots"}
REMEDY = (
    "Leave data.prepared out of the recipe (the default is a folder of its own for these settings), name another one, "
    "or rewrite this one with `python -m pipeline prepare RECIPE --replace`."
)


@dataclass(frozen=True)
class Origin:
    """The origin of a split; see the module's docstring."""

    fingerprint: str  # of the source: text files, limit, sizes and modification times of images
    settings: Mapping[str, Any] = field(default_factory=dict)
    records: int | None = None
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by path relative to the root

    def facts(self) -> dict[str, Any]:
        """The entries of dataset.json besides `source_fingerprint`."""
        return {SETTINGS: dict(self.settings), RECORDS: self.records, SOURCE_FILES: dict(self.files)}


def file_state(path: Path) -> dict[str, Any]:
    """Size, modification time and hash of a text file of a source."""
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256(path)}


def other_settings(description: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """A clause that names the first setting of a split which differs from the recipe's; None where none does.

    A smaller limit is no difference, because a run uses only the first samples; a larger one is, unless the source has
    no more records. For a split without recorded settings (of an earlier version) the result is None.
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
    """The text files of a split's source under `root` that changed; empty where none of them exists any more.

    Only files with the same size and another modification time are hashed.
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
    """Eight hex digits that identify settings; without fields at their defaults, so that new fields change no hash."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def folder_label(root: str) -> str:
    """The first part of the name of a prepared folder: the last part of its source's folder, in safe letters."""
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in Path(root).name)
    return name.strip("._-") or "data"


def shared_or_each(by_name: Mapping[str, Mapping[str, Any]]) -> Any:
    """One value for settings by name: the settings that all names share, else a mapping sorted by name.

    With shared settings the value does not depend on which names there are, nor on their order.
    """
    values = list(by_name.values())
    if all(value == values[0] for value in values):
        return values[0] if values else {}
    return {name: dict(by_name[name]) for name in sorted(by_name)}


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
