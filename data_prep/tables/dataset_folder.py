"""Finds the files of a Hugging Face dataset that was saved or downloaded as a folder.

Two layouts are known: that of `save_to_disk` (state.json beside Arrow files, with dataset_dict.json one folder for each
split) and the Hub's (`train-00000-of-00002.parquet`, in the folder itself, in `data` or in one folder for each
configuration).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources.text_files import read_json
from data_prep.tables.arrow_files import classes_of
from pipeline.errors import UserError

STATE, INFO, DICT = "state.json", "dataset_info.json", "dataset_dict.json"
SHARD = re.compile(r"(?P<split>\w[\w.-]*?)-(?P<number>\d+)-of-(?P<count>\d+)(?:-[0-9a-f]+)?\.parquet")
EXPECTED = (
    "expected a dataset saved by save_to_disk (state.json beside Arrow files) or the Hub's files "
    "(train-00000-of-00001.parquet)"
)


@dataclass(frozen=True)
class DatasetFiles:
    """The files of each split of a dataset, and the names of classes by column that its description has."""

    splits: dict[str, list[Path]]
    classes: dict[str, list[str]] = field(default_factory=dict)


def dataset_files(folder: Path) -> DatasetFiles:
    """The files of a dataset's folder; raises UserError for another folder, and for one that lacks files."""
    if (folder / DICT).is_file():
        names = _strings(folder / DICT, "splits")
        classes: dict[str, list[str]] = {}
        for name in names:
            classes |= _classes(folder / name)
        return DatasetFiles({name: _saved(folder / name) for name in names}, classes)
    if (folder / STATE).is_file():
        return DatasetFiles({"": _saved(folder)}, _classes(folder))
    if (folder / INFO).is_file() and not list(folder.rglob("*.parquet")):
        raise UserError(f"{folder} has {INFO} and no {STATE}: it was saved in part. Save or copy the dataset again.")
    found = {place: splits for place in _places(folder) if (splits := _parquet(place))}
    if not found:
        raise UserError(f"{folder} is a folder without a dataset; {EXPECTED}, or name one file.")
    if len(found) > 1:
        places = ", ".join(str(place) for place in found)
        raise UserError(f"{folder} has several configurations ({places}); name the folder of one.")
    return DatasetFiles(next(iter(found.values())))


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of one split that `save_to_disk` wrote."""
    if not (folder / STATE).is_file():
        raise UserError(f"{folder} has no {STATE}: the split was saved in part. Save or copy the dataset again.")
    state = read_json(folder / STATE, "the state of a saved dataset")
    entries = state.get("_data_files") if isinstance(state, dict) else None
    try:
        names = [str(entry["filename"]) for entry in entries or ()]
    except (TypeError, KeyError):
        names = []
    if not names:
        raise UserError(f"{folder / STATE} names no files; expected _data_files. Save the dataset again.")
    if isinstance(state, dict) and state.get("_indices_data_files"):
        raise UserError(f"{folder} has an order of its own ({STATE}); save the dataset again after flatten_indices().")
    foreign = next((name for name in names if Path(name).name != name), None)
    if foreign is not None:
        raise UserError(f"{folder / STATE} names '{foreign}', which is not in its folder. Save the dataset again.")
    return _present([folder / name for name in names])


def _places(folder: Path) -> list[Path]:
    """The folder, and those in it, which may hold the Parquet files of a configuration."""
    return [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))]


def _parquet(folder: Path) -> dict[str, list[Path]]:
    """The Parquet files of each split in a folder, in the order of their numbers."""
    shards: dict[str, dict[int, Path]] = {}
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("*.parquet")):
        match = SHARD.fullmatch(path.name)
        if match is None:
            shards.setdefault(path.stem, {})[0], counts[path.stem] = path, 1
            continue
        split, count = match["split"], int(match["count"])
        if counts.setdefault(split, count) != count:
            raise UserError(
                f"{folder} has files of {split} that are numbered of {counts[split]} and of {count}; keep those of one "
                "version."
            )
        shards.setdefault(split, {})[int(match["number"])] = path
    for split, files in shards.items():
        missing = [number for number in range(counts[split]) if number not in files]
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of the {counts[split]} files of {split} (the first: number "
                f"{missing[0]:05d}). Download the dataset again."
            )
    return {split: _present([files[number] for number in sorted(files)]) for split, files in shards.items()}


def _present(files: list[Path]) -> list[Path]:
    absent = [path for path in files if not path.is_file()]
    if absent:
        raise UserError(f"{absent[0]} does not exist ({len(absent)} of {len(files)} files). Restore it.")
    return files


def _classes(folder: Path) -> dict[str, list[str]]:
    info: Any = read_json(folder / INFO, "the description of a dataset") if (folder / INFO).is_file() else {}
    return classes_of(info.get("features") if isinstance(info, dict) else None)


def _strings(path: Path, name: str) -> list[str]:
    content = read_json(path, "the splits of a saved dataset")
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list) or not found or not all(_is_name(text) for text in found):
        raise UserError(f"{path} is {json.dumps(content)[:80]}; expected a list of {name}. Save the dataset again.")
    return found


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and Path(text).name == text and text not in ("", ".", "..")
