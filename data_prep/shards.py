"""Writes samples as WebDataset tars with an index; the format is described in `pipeline.data.shards`.

The same source gives byte-identical shards, which hold no times, users or machine names. Every file is written
atomically and dataset.json last, so a folder without it is not prepared. An interrupted write resumes at the first
unfinished shard.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset as wds

from data_prep.bad_records import BadRecord, Tolerance
from pipeline.data.checksums import CHECKSUMS_FILE
from pipeline.data.pictures import is_plain, read_header
from pipeline.data.sample import Sample
from pipeline.data.shards import (
    DATASET_FILE,
    FINGERPRINT,
    FORMAT_VERSION,
    INDEX_FILE,
    INDEX_SCHEMA,
    KEYS_FILE,
    KEYS_TABLE,
    SHARD_NAME,
    IndexedShards,
    read_description,
)
from pipeline.data.stored_pictures import CHANGED, UPRIGHT, require_upright
from pipeline.errors import UserError
from pipeline.files.atomic import replacing, sha256

Row = dict[str, Any]
# Yields the records of a source from the n-th on, so that a resumed write does not read the finished ones.
ReadFrom = Callable[[int], Iterable[Sample | BadRecord]]

# File name extensions where they differ from the format's name in lower case.
_EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


def write_shards(
    read_from: ReadFrom,
    folder: Path,
    shard_samples: int,
    source_fingerprint: str,
    task: str,
    split: str,
    progress: Callable[[int], None] = lambda samples: None,
    tolerance: Tolerance | None = None,
) -> tuple[dict[str, Any], bool]:
    """Write a split's shards, index and dataset.json unless they are up to date.

    Bad records are left out and listed in dataset.json; those that an earlier call left out count towards `tolerance`
    too. Raises UserError for more bad records than that and for an empty source.

    Args:
        read_from: yields the source's records from a given one on.
        folder: where the split is written.
        shard_samples: samples per shard.
        source_fingerprint: recorded in dataset.json; shards of another source are written again.
        task: name of the task.
        split: train or test.
        progress: called with the number of samples that were done since its last call.
        tolerance: limit on bad records; None: none may be left out.

    Returns:
        The content of dataset.json, and whether anything was written.
    """
    tolerance = tolerance or Tolerance(0)
    made_from = {"source_fingerprint": source_fingerprint, "shard_samples": shard_samples, "format": FORMAT_VERSION}
    description = prepared(folder, made_from)
    if description is not None:
        _skip(description.get("skipped", []), tolerance)
        progress(description["count"])
        return description, False
    folder.mkdir(parents=True, exist_ok=True)
    for name in (DATASET_FILE, CHECKSUMS_FILE):
        (folder / name).unlink(missing_ok=True)
    parts = _finished_parts(folder, made_from)
    count = sum(part["shard"]["samples"] for part in parts)
    for part in parts:
        _skip(part["skipped"], tolerance)
    progress(count)
    records = iter(read_from(count + sum(len(part["skipped"]) for part in parts)))
    while True:
        batch, skipped = _take(records, shard_samples, tolerance)
        if not batch:
            break
        parts.append(_write_shard(folder, len(parts), count, batch, skipped, made_from))
        count += len(batch)
        progress(len(batch))
    if not count:
        raise UserError(f"The {split} split of task {task!r} has no samples; expected at least one. Check data.root.")
    skipped = [record for part in parts for record in part["skipped"]] + skipped
    return _finish(folder, parts, {"task": task, "split": split, "count": count, **made_from, "skipped": skipped}), True


def write_some_shards(
    read_from: ReadFrom, folder: Path, shard_samples: int, source_fingerprint: str, numbers: Iterable[int]
) -> int:
    """Write the missing shards of these numbers and return how many were written.

    For several processes that share the work; `write_shards` then only adds the index and dataset.json. Raises
    UserError for a bad record: leaving one out would shift all later samples, which other processes are writing.
    """
    made_from = {"source_fingerprint": source_fingerprint, "shard_samples": shard_samples, "format": FORMAT_VERSION}
    if prepared(folder, made_from) is not None:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    wrote = 0
    for number in numbers:
        if _finished_part(folder, number, made_from) is not None:
            continue
        first, batch = number * shard_samples, []
        for record in islice(read_from(first), shard_samples):
            if isinstance(record, BadRecord):
                raise UserError(
                    f"{record.sentence()} Several processes together cannot leave records out: correct it, or prepare "
                    "this recipe in one process with --skip-bad."
                )
            batch.append(record)
        _write_shard(folder, number, first, batch, [], made_from)
        wrote += 1
    return wrote


def _take(
    records: Iterator[Sample | BadRecord], count: int, tolerance: Tolerance
) -> tuple[list[Sample], list[dict[str, str]]]:
    """Return the next `count` samples (fewer at the end) and the bad records among them as dataset.json lists them."""
    samples: list[Sample] = []
    skipped: list[dict[str, str]] = []
    for record in records:
        if isinstance(record, BadRecord):
            tolerance.skip(record)
            skipped.append(record.as_json())
            continue
        samples.append(record)
        if len(samples) == count:
            break
    return samples, skipped


def _skip(records: list[dict[str, str]], tolerance: Tolerance) -> None:
    for record in records:
        tolerance.skip(BadRecord(**record))


def prepared(folder: Path, made_from: dict[str, Any]) -> dict[str, Any] | None:
    """Return dataset.json of a split that is complete and was made from this source, else None."""
    try:
        description = read_description(folder)
        if any(description.get(name) != value for name, value in made_from.items()):
            return None
        shards = IndexedShards(folder)
        require_upright(shards)
    except UserError:
        return None
    return shards.description


def discard(folder: Path) -> None:
    """Remove a split's files, so that the next `write_shards` and `write_keys` write all of them again."""
    for name in (DATASET_FILE, INDEX_FILE, KEYS_FILE, KEYS_TABLE):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob("shard-*"):
        path.unlink()


def _write_shard(
    folder: Path,
    number: int,
    first: int,
    samples: list[Sample],
    skipped: list[dict[str, str]],
    made_from: dict[str, Any],
) -> Row:
    """Write one shard and, after it, its part file: the shard's entry in dataset.json and its rows of the index."""
    path = folder / SHARD_NAME.format(number)
    rows, changed = [], 0
    with replacing(path) as temporary:
        with (
            temporary.open("wb") as file,
            wds.TarWriter(file, encoder=False, user="", group="", mode=0o644, mtime=0) as tar,
        ):
            for position, sample in enumerate(samples, start=first):
                key = f"{position:08d}"  # not the id, as WebDataset splits member names at the first dot
                picture, plain = _picture(sample)
                changed += not plain
                record = {"__key__": key, "json": sample.to_json()}
                if sample.image is not None:
                    record[_EXTENSIONS.get(picture["image_format"], picture["image_format"].lower())] = sample.image
                tar.write(record)
                lengths = {"question_chars": len(sample.question), "answer_chars": len(sample.answer)}
                rows.append({"key": key, "id": sample.id, "shard": number, **picture, **lengths})
        _add_extents(temporary, rows)
        shard = {
            "name": path.name,
            "samples": len(samples),
            "size": temporary.stat().st_size,
            "sha256": sha256(temporary),
        }
    part = {"made_from": made_from, "shard": shard, "skipped": skipped, CHANGED: changed, "rows": rows}
    _write_json(_part_file(folder, number), part)
    return part


def _picture(sample: Sample) -> tuple[Row, bool]:
    """The index's columns about a sample's image, and whether the image is used as it is stored (see `is_plain`)."""
    if sample.image is None:
        return {"image_format": None, "width": None, "height": None}, True
    try:
        header = read_header(sample.image)
        row = {"image_format": header.format, "width": header.width, "height": header.height}
        return row, is_plain(sample.image)
    except Exception as error:
        raise UserError(f"The image of sample {sample.id!r} cannot be read ({error}). Correct the source.") from error


def _add_extents(shard: Path, rows: list[Row]) -> None:
    with tarfile.open(shard) as tar:
        extents = {}
        for member in tar:
            key, _, extension = member.name.partition(".")
            extents[key, extension == "json"] = (member.offset_data, member.size)
    for row in rows:
        row["json_offset"], row["json_size"] = extents[row["key"], True]
        row["image_offset"], row["image_size"] = extents.get((row["key"], False), (None, None))


def _finished_parts(folder: Path, made_from: dict[str, Any]) -> list[Row]:
    parts: list[Row] = []
    while (part := _finished_part(folder, len(parts), made_from)) is not None:
        parts.append(part)
    return parts


def _finished_part(folder: Path, number: int, made_from: dict[str, Any]) -> Row | None:
    try:
        part = json.loads(_part_file(folder, number).read_text("utf-8"))
        size = (folder / part["shard"]["name"]).stat().st_size
    except (OSError, ValueError, KeyError):
        return None
    whole = part["made_from"] == made_from and size == part["shard"]["size"] and {"skipped", CHANGED} <= part.keys()
    return part if whole else None


def _finish(folder: Path, parts: list[Row], description: dict[str, Any]) -> dict[str, Any]:
    shards = [part["shard"] for part in parts]
    changed = sum(part[CHANGED] for part in parts)
    fingerprint = dataset_fingerprint(shards, changed)
    description = {**description, "fingerprint": fingerprint, CHANGED: changed, "shards": shards}
    index = pa.Table.from_pylist([row for part in parts for row in part["rows"]], schema=INDEX_SCHEMA)
    with replacing(folder / INDEX_FILE) as temporary:
        pq.write_table(index.replace_schema_metadata({FINGERPRINT: description["fingerprint"]}), temporary)
    _write_json(folder / DATASET_FILE, description)
    kept = {shard["name"] for shard in shards}
    for path in folder.glob("shard-*"):
        if path.name not in kept:  # part files, temporary files of a killed write, shards of an earlier, longer source
            path.unlink()
    return description


def dataset_fingerprint(shards: list[dict[str, Any]], changed: int = 0) -> str:
    """Return the hash over the shards' hashes that identifies a split's content.

    `changed` is the number of images that are not used as they are stored (see `stored_pictures`); with some, the hash
    differs from that of versions which used them as stored.
    """
    lines = [f"format {FORMAT_VERSION}", *(shard["sha256"] for shard in shards)]
    lines += [UPRIGHT] if changed else []
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _part_file(folder: Path, number: int) -> Path:
    return folder / (SHARD_NAME.format(number) + ".part.json")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
