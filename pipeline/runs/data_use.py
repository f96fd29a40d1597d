"""Records the prepared data that a run uses in its run.json, and finds the runs that use a prepared folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.data.shards import DATASET_FILE, IndexedShards
from pipeline.runs.layout import CONFIG, EVALUATIONS, META, STAGES, STATE
from pipeline.runs.state import read_state

DATA = "data"  # in run.json
STAGE_META = f"{STAGES}/*/{META}"
NAMED = 5  # runs that a message names


def data_record(splits: Iterable[tuple[str, str, IndexedShards, int | None]]) -> dict[str, Any]:
    """The entry `data` of run.json: per task and split the folder, its fingerprint, and numbers of samples.

    `splits` are (task, split, its shards, limit on the samples used). Folders are absolute, because they are searched
    for before a folder is rewritten.
    """
    record: dict[str, Any] = {}
    for task, split, shards, limit in splits:
        used = len(shards) if limit is None else min(limit, len(shards))
        record.setdefault(task, {})[split] = {
            "folder": str(shards.folder.resolve()),
            "fingerprint": shards.fingerprint,
            "samples": len(shards),
            "used": used,
        }
    return record


def recorded_fingerprint(run: Path, task: str, split: str) -> str | None:
    """The fingerprint of the data that a run used for a split; None where it has used none yet."""
    used = read_state(run).get(DATA)
    if used is None:
        return _recorded_before(run, task, split)
    return used.get(task, {}).get(split, {}).get("fingerprint")


def _recorded_before(run: Path, task: str, split: str) -> str | None:
    """`recorded_fingerprint` for a run of an earlier version, from the meta.json of its stages and its score files."""
    if split == "train":
        learned = [data for meta in _contents(run, STAGE_META) if isinstance(data := meta.get(DATA), dict)]
        return next((data[task] for data in learned if task in data), None)
    scored = [
        made
        for score in _contents(run, f"{EVALUATIONS}/*/{task}.score.json")
        if isinstance(made := score.get("made_with"), dict)
    ]
    return next((made[DATA] for made in scored if isinstance(made.get(DATA), str)), None)


def dependants(folder: Path, runs: Path) -> list[str]:
    """The runs in the folder `runs` that used the present content of the split in `folder`, sorted."""
    try:
        fingerprint = json.loads((folder / DATASET_FILE).read_text("utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    where = folder.resolve()
    found = []
    for run in sorted(path.parent for path in runs.glob(f"*/{CONFIG}")):
        used = read_state(run).get(DATA)
        if used is None:
            depends = _depended(run, where, fingerprint)
        else:
            depends = any(
                split.get("fingerprint") == fingerprint and Path(split.get("folder", "")) == where
                for splits in used.values()
                for split in splits.values()
            )
        if depends:
            found.append(str(run))
    return found


def named(runs: list[str]) -> str:
    """The first runs of a list and the number of further ones, as text."""
    more = f" and {len(runs) - NAMED} more" if len(runs) > NAMED else ""
    return f"{', '.join(runs[:NAMED])}{more}"


def _depended(run: Path, folder: Path, fingerprint: str) -> bool:
    """Whether a run of an earlier version, which recorded no folders, uses a split for training or for scoring."""
    try:
        prepared = yaml.safe_load((run / CONFIG).read_text("utf-8"))["data"]["prepared"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return False
    if folder.parent.parent != Path(prepared).resolve():
        return False
    learned = [value for meta in _contents(run, STAGE_META) if isinstance(value := meta.get(DATA), dict)]
    if folder.name == "train" and learned:
        return any(fingerprint in data.values() for data in learned)
    return (run / STATE).is_file()


def _contents(run: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """The objects in a run's JSON files that match `pattern`, without unreadable files."""
    for path in sorted(run.glob(pattern)):
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict):
            yield content
