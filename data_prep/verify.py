"""Verification of a prepared split: reads all of it and checks that its parts are complete and match each other.

A split that passes gets a file `verified.json`. `prepare` verifies a split again only where this file is missing, or
names other shards or keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from data_prep.shards import dataset_fingerprint
from pipeline.data.checksums import CHECKSUMS_FILE, write_checksums
from pipeline.data.ids import Ids
from pipeline.data.pictures import read_header
from pipeline.data.shards import (
    DATASET_FILE,
    FINGERPRINT,
    FIX,
    IDENTITY_FIELDS,
    INDEX_FILE,
    KEYS_FILE,
    KEYS_TABLE,
    IndexedShards,
    read_index,
)
from pipeline.data.stored_pictures import changed_pictures
from pipeline.errors import UserError
from pipeline.files.atomic import replacing, sha256

VERIFIED_FILE = "verified.json"
ROWS_AT_ONCE = 1 << 16  # rows of keys that are read at once, as all of them may exceed the machine's memory


def verify_split(folder: Path, expected_identity: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Check the hashes, every row of the index and the keys of a prepared split; return its dataset.json.

    Raises UserError that names the first part that is missing, changed, or belongs to another dataset.
    """
    folder = Path(folder)
    shards = IndexedShards(folder)
    description = shards.description
    for shard in description["shards"]:
        found = sha256(folder / shard["name"])
        if found != shard["sha256"]:
            raise UserError(
                f"The shard {folder / shard['name']} has content {found[:12]}..., {DATASET_FILE} says "
                f"{shard['sha256'][:12]}...: it was changed. {FIX}"
            )
    if dataset_fingerprint(description["shards"], changed_pictures(description)) != shards.fingerprint:
        raise UserError(f"The fingerprint in {folder / DATASET_FILE} is not that of its shards. {FIX}")
    pictures = _check_rows(shards)
    _check_keys(shards, pictures, expected_identity)
    return description


def is_verified(folder: Path, fingerprint: str, identity: Mapping[str, str]) -> bool:
    """Whether `verified.json` says that this content of a split, with keys of this CLIP, passed `verify_split`."""
    try:
        mark = json.loads((folder / VERIFIED_FILE).read_text("utf-8"))
        return mark == _mark(fingerprint, identity) and (folder / CHECKSUMS_FILE).is_file()
    except (OSError, ValueError):
        return False


def mark_verified(folder: Path, fingerprint: str, identity: Mapping[str, str]) -> None:
    """Write `verified.json` for a split that passed `verify_split`, and checksums of its records."""
    shards = IndexedShards(folder)
    records = (shards.checksums(row) for row in range(len(shards)))
    write_checksums(folder, fingerprint, records, (INDEX_FILE, KEYS_FILE))
    with replacing(folder / VERIFIED_FILE) as temporary:
        temporary.write_text(json.dumps(_mark(fingerprint, identity), indent=1) + "\n", "utf-8")


def unmark(folder: Path) -> None:
    """Remove `verified.json` and the checksums of a split that is about to change or to be verified again."""
    for name in (VERIFIED_FILE, CHECKSUMS_FILE):
        (folder / name).unlink(missing_ok=True)


def _mark(fingerprint: str, identity: Mapping[str, str]) -> dict[str, str]:
    return {FINGERPRINT: fingerprint, **{name: identity[name] for name in IDENTITY_FIELDS}}


def verify_all(folder: Path) -> list[Path]:
    """Verify every prepared split under `folder` and return their folders; raises UserError when there is none."""
    splits = sorted(path.parent for path in Path(folder).rglob(DATASET_FILE))
    if not splits:
        raise UserError(
            f"{folder} holds no prepared data (no {DATASET_FILE} in it or below). "
            "Run `python -m pipeline prepare RECIPE`."
        )
    for split in splits:
        verify_split(split)
    return splits


def _check_rows(shards: IndexedShards) -> list[bool]:
    """Read every sample through the index and compare the size of its image; return which have an image."""
    table = read_index(shards.folder, shards.description)
    sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
    pictures = []
    for row, size in enumerate(sizes):
        sample = shards[row]
        pictures.append(sample.image is not None)
        found = None if sample.image is None else _size(sample.image)
        if (found or (None, None)) != size:
            raise UserError(
                f"{shards.folder / INDEX_FILE} gives sample {sample.id!r} an image of size {size}, found {found}. {FIX}"
            )
    return pictures


def _size(encoded: bytes) -> tuple[int, int] | None:
    try:
        header = read_header(encoded)
    except Exception:  # PIL raises many kinds of errors for bytes that are no image
        return None
    return header.width, header.height


def _check_keys(shards: IndexedShards, pictures: list[bool], expected_identity: Mapping[str, str] | None) -> None:
    keys = shards.keys(expected_identity)
    if keys.has_image.tolist() != pictures:
        raise UserError(
            f"The CLIP keys in {shards.folder} disagree with the index on which samples have an image. {FIX}"
        )
    everywhere = torch.ones_like(keys.has_image)
    for name, rows, there in (("image", keys.image, keys.has_image), ("text", keys.text, everywhere)):
        for part, wanted in zip(rows.split(ROWS_AT_ONCE), there.split(ROWS_AT_ONCE), strict=True):
            found = part[wanted]
            if not found.isfinite().all() or not found.any(dim=1).all():
                raise UserError(f"The {name} keys in {shards.folder} have rows that are zero or not finite. {FIX}")
    path = shards.folder / KEYS_TABLE
    try:
        table = pq.read_table(path, columns=["id"])
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}). {FIX}") from error
    if (table.schema.metadata or {}).get(FINGERPRINT.encode()) != shards.fingerprint.encode():
        raise UserError(f"{path} was computed for another dataset. {FIX}")
    if Ids(table["id"]) != shards.ids:
        raise UserError(f"{path} lists other samples than the index. {FIX}")
