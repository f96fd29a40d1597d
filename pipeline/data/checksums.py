"""Checksums of a prepared split, one per record and one per table, to detect bits that changed on the disk.

`checksums.safetensors` is written when a split has been verified, and used only with the dataset fingerprint that it
records. A split without the file (prepared by an earlier version) is read unchecked.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from pipeline.errors import UserError
from pipeline.files.atomic import replacing, sha256, write_synced

CHECKSUMS_FILE = "checksums.safetensors"
MARK_BLOCKS, MARK_BYTES = 32, 4096  # what `table_mark` reads of a table


@dataclass(frozen=True)
class Checksums:
    """Checksums of a split's content when it was verified; empty for a split without them."""

    records: npt.NDArray[np.uint32] | None = None  # [N] CRC-32 of each record, see `checksum`
    texts: npt.NDArray[np.uint32] | None = None  # [N] the same without the image; None in splits of earlier versions
    tables: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the index and the keys by file name

    def only(self, rows: npt.NDArray[np.int64]) -> Checksums:
        """The checksums of the records at `rows`."""
        records, texts = (None if known is None else known[rows] for known in (self.records, self.texts))
        return Checksums(records, texts, self.tables)

    def check_table(self, path: Path, fix: str) -> None:
        """Raise UserError when a table is not the one that was verified."""
        expected = self.tables.get(path.name)
        if expected is not None and sha256(path) != expected:
            raise UserError(f"{path} was changed since it was verified (its sha256 in {CHECKSUMS_FILE}). {fix}")


def table_mark(path: Path) -> str:
    """A hash (hex) of a table's size and of blocks spaced over it; "" where the table does not exist.

    For a quick comparison where another process has checked the whole table (`Checksums.check_table`).
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            for place in range(MARK_BLOCKS):
                file.seek(place * size // MARK_BLOCKS)
                digest.update(file.read(MARK_BYTES))
    except OSError:
        return ""
    return digest.hexdigest()


def checksum(record: bytes, image: bytes | None) -> int:
    """CRC-32 of a record's JSON followed by its image."""
    return zlib.crc32(image or b"", zlib.crc32(record))


def read_checksums(folder: Path, fingerprint: str) -> Checksums:
    """The checksums of a split with this content; empty when there are none or they are of another content."""
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return Checksums()
    try:
        with safe_open(path, framework="numpy") as file:
            facts = file.metadata() or {}
            if facts.get("fingerprint") != fingerprint:
                return Checksums()
            texts = file.get_tensor("texts") if "texts" in file.keys() else None  # noqa: SIM118 - not a dict
            return Checksums(file.get_tensor("records"), texts, json.loads(facts["tables"]))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Remove it and run `python -m pipeline prepare RECIPE` to write it anew."
        ) from None


def write_checksums(folder: Path, fingerprint: str, records: Iterable[tuple[int, int]], tables: Iterable[str]) -> None:
    """Write the checksums of a verified split.

    Args:
        folder: the split.
        fingerprint: the dataset fingerprint of its content.
        records: per record, its checksum and that of its JSON without the image.
        tables: names of its files that get a checksum of their own.
    """
    facts = {"fingerprint": fingerprint, "tables": json.dumps({name: sha256(folder / name) for name in tables})}
    with replacing(folder / CHECKSUMS_FILE) as temporary:
        found = np.fromiter(records, dtype=np.dtype((np.uint32, 2)))
        tensors = {"records": found[:, 0].copy(), "texts": found[:, 1].copy()}
        write_synced(temporary, save(tensors, metadata=facts))
