"""The prepared-data format and its reader: WebDataset tars with an index, read at random by offset.

A split folder holds `shard-NNNNNN.tar` (members `<key>.json`, `<key>.<image extension>`), `index.parquet` (one row per
sample), `dataset.json` (counts, sizes, hashes) and `keys.safetensors` (CLIP keys, row i belongs to index row i).
See docs/design.md 3.6, 7.5 and 7.6.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.checksums import checksum, read_checksums, table_mark
from pipeline.data.ids import Ids
from pipeline.data.key_file import FINGERPRINT, FIX, IDENTITY_FIELDS, KEYS_FILE, first_line
from pipeline.data.sample import Sample
from pipeline.data.shard_files import ShardFiles
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.keys import Keys

__all__ = ["FINGERPRINT", "FIX", "IDENTITY_FIELDS", "KEYS_FILE", "IndexedShards", "read_index"]

FORMAT_VERSION = 1
SHARD_NAME = "shard-{:06d}.tar"
DATASET_FILE = "dataset.json"
INDEX_FILE = "index.parquet"
KEYS_TABLE = "keys.parquet"  # the same keys with ids, for analysis

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("id", pa.string()),
        ("shard", pa.int32()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int64()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("image_format", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("question_chars", pa.int32()),
        ("answer_chars", pa.int32()),
    ]
)

# What a run reads of the index; the key is that of the tar member, for people and other readers.
READ_COLUMNS = [name for name in INDEX_SCHEMA.names if name not in ("key", "image_format")]


class IndexedShards:
    """Random access to a prepared split; opens shards on first use; safe to fork and to pickle.

    Raises UserError when the split is not prepared or incomplete, or when its parts do not match each other.
    """

    def __init__(self, folder: str | os.PathLike[str], check: bool = True) -> None:
        """Open the split in `folder`.

        `check` False skips the checksums of tables and the sizes of shards, for a rank that compares `marks` with those
        of a rank that checked them.
        """
        self.folder = Path(folder)
        self._check = check
        self.description = read_description(self.folder)
        self.fingerprint: str = self.description["fingerprint"]
        self._shards = [self.folder / shard["name"] for shard in self.description["shards"]]
        self._check_shards()
        self._checksums = read_checksums(self.folder, self.fingerprint)
        if check:
            self._checksums.check_table(self.folder / INDEX_FILE, FIX)
        index = read_index(self.folder, self.description, READ_COLUMNS)
        self.ids = Ids(index["id"])
        self._shard = index["shard"].to_numpy()
        self._json = _extents(index, "json")
        self._image = _extents(index, "image")
        self.question_chars: npt.NDArray[np.int32] = index["question_chars"].to_numpy()  # [N]
        self.answer_chars: npt.NDArray[np.int32] = index["answer_chars"].to_numpy()  # [N]
        # Width and height of the upright pictures [N, 2], 0 without one; numbers of tokens are computed from them.
        self.sizes: npt.NDArray[np.int32] = np.stack(
            [index[side].fill_null(0).to_numpy() for side in ("width", "height")], axis=1
        )
        self.left_out: Sequence[int] = ()  # rows that training does not use, see data.too_long
        self._files = ShardFiles(self._shards)
        self.rows: npt.NDArray[np.int64] | None = None  # [N] rows of the split that these samples are; None: all

    def only(self, rows: npt.NDArray[np.int64]) -> IndexedShards:
        """The samples at `rows` as a split of their own."""
        picked = copy.copy(self)
        picked.rows = rows if self.rows is None else self.rows[rows]
        picked.ids = self.ids.only(rows)
        picked.left_out = np.flatnonzero(np.isin(rows, self.left_out)).tolist()
        for name in ("_shard", "_json", "_image", "question_chars", "answer_chars", "sizes"):
            setattr(picked, name, getattr(self, name)[rows])
        picked._checksums = self._checksums.only(rows)
        return picked

    def whole(self) -> IndexedShards:
        """The split with all its samples, where these are only some of them."""
        return self if self.rows is None else IndexedShards(self.folder, check=False)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Characters of question and answer [N]."""
        return self.question_chars.astype(np.int64) + self.answer_chars

    def marks(self) -> dict[str, str]:
        """A quick hash of each table of this split (see `table_mark`), to compare splits between ranks."""
        return {name: table_mark(self.folder / name) for name in (INDEX_FILE, KEYS_FILE)}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Sample:
        index = range(len(self))[index]
        record, image = self._record(index)
        expected = self._checksums.records
        if expected is not None and checksum(record, image) != expected[index]:
            raise self._changed(index)
        return self._sample(index, record, image)

    def text(self, index: int) -> Sample:
        """A sample without its image, which is not read where the text has a checksum of its own."""
        index = range(len(self))[index]
        expected = self._checksums.texts
        if expected is None and self._checksums.records is not None:
            return replace(self[index], image=None)
        record = self._read(int(self._shard[index]), *self._json[index])
        if expected is not None and checksum(record, None) != expected[index]:
            raise self._changed(index)
        return self._sample(index, record, None)

    def _sample(self, index: int, record: bytes, image: bytes | None) -> Sample:
        try:
            sample = Sample.from_json(record, image)
        except (ValueError, KeyError, TypeError) as error:
            raise self._wrong_content(index) from error
        if sample.id != self.ids[index]:
            raise self._wrong_content(index)
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def keys(self, expected_identity: Mapping[str, str] | None = None) -> Keys:
        """Return the routing keys of all samples.

        Raises UserError when they are missing or belong to another dataset, or with `expected_identity` (see
        `pipeline.backbones.clip.key_identity`) to another CLIP.
        """
        from pipeline.data.keys import read_keys  # here: it imports torch, which reading samples does not need

        keys = read_keys(self.folder, self.description, expected_identity)
        if self._check:
            self._checksums.check_table(self.folder / KEYS_FILE, FIX)
        return keys

    @property
    def json_sizes(self) -> npt.NDArray[np.int64]:
        """Bytes of each sample's JSON [N]."""
        return self._json[:, 1]

    def has_image(self, index: int) -> bool:
        """Whether a sample has an image."""
        return bool(self._image[index][1] >= 0)

    def image_bytes(self, index: int, most: int | None = None) -> bytes:
        """The content of a sample's image file, or its first `most` bytes."""
        offset, size = self._image[index]
        return self._read(int(self._shard[index]), int(offset), int(size if most is None else min(size, most)))

    def checksums(self, index: int) -> tuple[int, int]:
        """The present CRC-32 of a sample and that of its text alone."""
        record, image = self._record(index)
        return checksum(record, image), checksum(record, None)

    def _record(self, index: int) -> tuple[bytes, bytes | None]:
        """The stored JSON and image of a sample."""
        shard = int(self._shard[index])
        offset, size = self._image[index]
        image = self._read(shard, offset, size) if size >= 0 else None
        return self._read(shard, *self._json[index]), image

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self._shards[shard]
        try:
            found = self._files.read(shard, int(size), int(offset))
        except FileNotFoundError:
            raise UserError(f"The shard {path} is missing; {DATASET_FILE} lists it. {FIX}") from None
        if len(found) != size:
            raise UserError(f"{path} ends early: {len(found)} of {size} bytes could be read at {offset}. {FIX}")
        return found

    def _check_shards(self) -> None:
        """Raise UserError unless every shard exists and, with `check`, has its recorded size."""
        there = set(os.listdir(self.folder))
        for path, shard in zip(self._shards, self.description["shards"], strict=True):
            if path.name not in there:
                raise UserError(f"The shard {path} is missing; {DATASET_FILE} lists it. {FIX}")
            if not self._check:
                continue
            found, expected = path.stat().st_size, shard["size"]
            if found != expected:
                raise UserError(f"The shard {path} has {found} bytes, expected {expected}: it is not whole. {FIX}")

    def _changed(self, index: int) -> UserError:
        return UserError(
            f"Sample {self.ids[index]!r} in {self._shards[self._shard[index]]} was changed since it was verified "
            f"(its CRC-32). Remove the folder {self.folder} and run `python -m pipeline prepare RECIPE`."
        )

    def _wrong_content(self, index: int) -> UserError:
        return UserError(
            f"{self._shards[self._shard[index]]} does not hold sample {self.ids[index]!r} where {INDEX_FILE} says: "
            f"the shard belongs to another dataset or was changed. {FIX}"
        )


def read_description(folder: Path) -> dict[str, Any]:
    """Return dataset.json of a prepared split; raises UserError when it is missing, damaged or of another format."""
    path = folder / DATASET_FILE
    try:
        description = json.loads(path.read_text("utf-8"))
        version = description["format"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has data format {version}, this version reads format {FORMAT_VERSION}. {FIX}")
        missing = {"count", "shards", "fingerprint"} - description.keys()
    except FileNotFoundError:
        raise UserError(
            f"{folder} holds no prepared data ({DATASET_FILE} is missing). "
            "Run `python -m pipeline prepare RECIPE` first."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}). {FIX}") from None
    if missing:
        raise UserError(f"{path} is damaged ({', '.join(sorted(missing))} missing). {FIX}")
    return description


def read_index(folder: Path, description: Mapping[str, Any], columns: list[str] | None = None) -> pa.Table:
    """Return these columns (None: all) of a prepared split's index.parquet.

    Raises UserError when the index is damaged or does not match dataset.json.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise UserError(f"The index {path} is missing. {FIX}")
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            known = schema.names == INDEX_SCHEMA.names
            index = file.read(columns if known else None)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"The index {path} cannot be read ({first_line(error)}). {FIX}") from None
    if (schema.metadata or {}).get(FINGERPRINT.encode()) != description["fingerprint"].encode():
        raise UserError(f"The index {path} belongs to another dataset than {DATASET_FILE} beside it. {FIX}")
    if not known or rows != description["count"]:
        raise UserError(
            f"The index {path} has {rows} rows with columns {', '.join(schema.names)}; expected "
            f"{description['count']} rows with columns {', '.join(INDEX_SCHEMA.names)}. {FIX}"
        )
    return index


def _extents(index: pa.Table, member: str) -> npt.NDArray[np.int64]:
    """Return (offset, size) of one member kind as [N, 2]; -1 where there is none."""
    columns = [index[f"{member}_{part}"].fill_null(-1).to_numpy() for part in ("offset", "size")]
    return np.stack(columns, axis=1).astype(np.int64)
