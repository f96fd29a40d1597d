"""Prepares one split from its source: decides whether it is up to date or may be rewritten, and replaces it atomically.

An existing split is rewritten only when its samples would change, it was made with the same settings, and no run uses
it; `--replace` allows the other cases. The new split is written beside the old one and renamed into its place when it
is complete, so a call that fails or is interrupted leaves the old one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.bad_records import BadRecord, Tolerance
from data_prep.shards import write_shards
from pipeline.data.origin import LIMIT, REMEDY, SETTINGS, Origin, other_settings
from pipeline.data.sample import Sample
from pipeline.data.shards import DATASET_FILE, IndexedShards, read_description
from pipeline.data.stored_pictures import require_upright
from pipeline.errors import UserError
from pipeline.files.atomic import remove_folder, replacing, sweep_temporaries
from pipeline.runs.data_use import dependants, named

NEXT, LAST = ".next", ".last"  # suffixes beside a split: the new one while it is written, the old one during the swap
REPLACE = "run `python -m pipeline prepare RECIPE --replace`"


class Source(Protocol):
    """The source of a split."""

    def records(self, start: int = 0, workers: int = 1) -> Iterable[Sample | BadRecord]:
        """The records from the `start`-th on."""
        ...

    def origin(self, settings: Mapping[str, Any]) -> Origin:
        """The entries about this source in dataset.json, read with these settings."""
        ...

    def with_limit(self, limit: int | None) -> Source:
        """The same source with another limit."""
        ...


@dataclass(frozen=True)
class Place:
    """The folder of a split and how it is written."""

    folder: Path
    task: str
    split: str
    shard_samples: int
    workers: int


class NotRewritten(UserError):
    """An existing split holds other data and is kept; `found` is the error message without the advice."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found} {remedy}")
        self.found = found


@dataclass(frozen=True)
class Rewriting:
    """Whether an existing split that holds other data may be rewritten."""

    replace: bool = False  # --replace
    runs: Path = Path("runs")  # folder of the runs that may use it
    may_grow: bool = False  # whether samples may be added to a split that runs use

    def refuse_settings(self, folder: Path, description: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        """Raise UserError when a split was made with other settings, as another recipe has them."""
        clause = other_settings(description, wanted)
        if clause is None and description.get(SETTINGS, wanted).get(LIMIT) != wanted.get(LIMIT):
            clause = "holds more records than the recipe's limit, and its source has changed"
        if clause is not None and not self.replace:
            raise NotRewritten(f"{folder} {clause}.", REMEDY)

    def refuse_runs(self, folder: Path) -> None:
        """Raise UserError that names the runs which use the existing split."""
        used = [] if self.replace else dependants(folder, self.runs)
        if used:
            raise NotRewritten(
                f"The source of {folder} has changed, and {named(used)} used what was prepared from it: those runs "
                "could not be resumed or evaluated.",
                f"To rewrite it all the same, {REPLACE}; to keep both, set data.prepared to a new folder.",
            )


def prepare_split(
    source: Source,
    settings: Mapping[str, Any],
    place: Place,
    tolerance: Tolerance,
    rewriting: Rewriting = Rewriting(),
    progress: Callable[[int], None] = lambda samples: None,
) -> tuple[dict[str, Any], bool]:
    """Bring the shards of a split up to date with its source; return dataset.json and whether any shard was written.

    A split with more samples than the recipe's limit is kept, because a run uses only the first ones. The caller holds
    the split's lock. Raises UserError for a split that must not be rewritten, and as `write_shards` does.

    Args:
        source: the split's source.
        settings: the recipe's settings that the split depends on.
        place: folder of the split and how it is written.
        tolerance: limit on bad records.
        rewriting: whether an existing split may be rewritten.
        progress: called with the number of samples that were done since its last call.
    """
    folder = place.folder
    _finish_swap(folder)
    for swept in (folder, folder.parent):  # files beside a split belong to it too
        sweep_temporaries(swept)
    origin, target = source.origin(settings), folder
    there = _description(folder)
    if there is not None and not rewriting.replace:
        kept = _kept(source, settings, origin, place, there)
        if kept is not None:
            return _up_to_date(folder, kept, tolerance, progress), False
        if there.get("source_fingerprint") != origin.fingerprint:
            rewriting.refuse_settings(folder, there, settings)
    if there is not None and (there.get("source_fingerprint") != origin.fingerprint or rewriting.replace):
        if not (rewriting.may_grow and _grows(source, folder)):
            rewriting.refuse_runs(folder)
        target = folder.with_name(folder.name + NEXT)
    description, wrote = write_shards(
        lambda start: source.records(start, place.workers),
        target,
        place.shard_samples,
        origin.fingerprint,
        place.task,
        place.split,
        progress,
        tolerance,
    )
    _describe(target, origin.facts())
    if target != folder:
        folder.rename(folder.with_name(folder.name + LAST))
        _finish_swap(folder)
    return {**description, **origin.facts()}, wrote


def _kept(
    source: Source, settings: Mapping[str, Any], origin: Origin, place: Place, there: Mapping[str, Any]
) -> Origin | None:
    """The origin of an existing split that is complete and holds the wanted samples; None where it does not.

    Settings are compared first, then the fingerprint of the source with the recipe's limit or the split's larger one.
    Where fingerprints differ, because files were copied or written again, the samples themselves are compared.
    """
    if other_settings(there, settings) is not None or not _is_whole(place.folder):
        return None
    found = there.get("source_fingerprint")
    if found == origin.fingerprint:
        return origin
    for limit in _larger_limits(there, settings.get(LIMIT)):
        larger = source.with_limit(limit)
        known = larger.origin({**settings, LIMIT: limit})
        if found == known.fingerprint or _same_samples(larger, place):
            return known
    return origin if _same_samples(source, place) else None


def _larger_limits(there: Mapping[str, Any], wanted: int | None) -> list[int | None]:
    """Limits above `wanted` with which a split may have been made."""
    if wanted is None:
        return []
    taken = there["count"] + len(there.get("skipped", []))
    recorded = there.get(SETTINGS)
    candidates = [recorded.get(LIMIT)] if recorded else [None, taken]
    return [limit for limit in candidates if limit is None or limit > wanted] if taken > wanted else []


def _up_to_date(folder: Path, origin: Origin, tolerance: Tolerance, progress: Callable[[int], None]) -> dict[str, Any]:
    _describe(folder, {"source_fingerprint": origin.fingerprint, **origin.facts()})
    description = read_description(folder)
    for record in description.get("skipped", []):
        tolerance.skip(BadRecord(**record))
    progress(description["count"])
    return description


def _is_whole(folder: Path) -> bool:
    try:
        require_upright(IndexedShards(folder))
    except UserError:
        return False
    return True


def _finish_swap(folder: Path) -> None:
    """Rename a complete new split to `folder` and remove the old one; also completes the swap of a killed call."""
    following, last = folder.with_name(folder.name + NEXT), folder.with_name(folder.name + LAST)
    if not folder.exists():
        if (following / DATASET_FILE).is_file():
            following.rename(folder)
        elif last.exists():
            last.rename(folder)
    if folder.exists() and last.exists():
        remove_folder(last)  # frees the name even where a process has a shard open over NFS


def _description(folder: Path) -> dict[str, Any] | None:
    try:
        return read_description(folder)
    except UserError:
        return None


def _same_samples(source: Source, place: Place) -> bool:
    """Whether a split holds the samples of its source; reads both up to the first difference."""
    try:
        shards, row = IndexedShards(place.folder), 0
        skipped = iter(shards.description.get("skipped", []))
        for record in source.records(0, place.workers):
            if isinstance(record, BadRecord):
                if next(skipped, None) != record.as_json():
                    return False
            elif row >= len(shards) or shards[row] != record:
                return False
            else:
                row += 1
        return row == len(shards) and next(skipped, None) is None
    except UserError:  # a damaged split is written again
        return False


def _grows(source: Source, folder: Path) -> bool:
    """Whether all samples of a split are still among its source's images, so that rewriting only adds samples."""
    try:
        ids = set(map(str, IndexedShards(folder).ids))
    except UserError:
        return False
    return ids <= {image.path for image in getattr(source, "images", ())}


def _describe(folder: Path, facts: Mapping[str, Any]) -> None:
    """Update fields of a split's dataset.json."""
    description = read_description(folder)
    if any(description.get(name) != value for name, value in facts.items()):
        with replacing(folder / DATASET_FILE) as temporary:
            content = json.dumps({**description, **facts}, indent=1, ensure_ascii=False)
            temporary.write_text(content + "\n", "utf-8")
