"""Reads Parquet files and the Arrow files that the library `datasets` saves, a few rows at a time.

Only the columns that are needed are read. The names of classes (`ClassLabel`) are taken from what `datasets` writes
into the schema.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.text_files import Columns
from data_prep.tables.rows import Row, Rows, named, plain_number
from pipeline.errors import UserError

BATCH = 64  # rows in memory at once, as each may hold the bytes of an image
ARROW_FILE = b"ARROW1"
PARQUET = b"PAR1"
LFS = b"version https://git-lfs"


def arrow_rows(files: Sequence[Path], columns: Columns, classes: Mapping[str, list[str]]) -> Rows:
    """The rows of one part of a dataset, which may lie in several files; numbers go on from file to file.

    `classes` are names of classes by column, where they are known from elsewhere.
    """
    numbers = itertools.count(1)
    for path in files:
        refuse_pointer(path)
        try:
            schema = _schema(path)
            names = named(str(path), schema.names, columns, "columns that are called")
            read = [theirs for theirs, name in zip(schema.names, names, strict=True) if name in columns.known]
            labels = {**classes, **class_names(schema)}
            ours = {theirs: (name, labels.get(theirs)) for theirs, name in zip(schema.names, names, strict=True)}
            for row, values in enumerate(_values(path, read), start=1):
                fields = {name: _named(values[theirs], known) for theirs in read for name, known in [ours[theirs]]}
                yield Row(f"{path}, row {row}", next(numbers), fields)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}: {' '.join(str(error).split())}). Restore the file."
            ) from None


def refuse_pointer(path: Path) -> None:
    """Raise UserError for what Git LFS leaves in place of a file that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            raise UserError(f"{path} is a pointer of Git LFS in place of the file; fetch it with `git lfs pull`.")


def class_names(schema: Any) -> dict[str, list[str]]:
    """The names of classes by column, as `datasets` writes them into a schema's metadata."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return classes_of(features)


def classes_of(features: Any) -> dict[str, list[str]]:
    """The names of classes by column, of the features of a dataset as `datasets` describes them."""
    if not isinstance(features, dict):
        return {}
    labels = (
        (name, kind) for name, kind in features.items() if isinstance(kind, dict) and kind.get("_type") == "ClassLabel"
    )
    return {name: kind["names"] for name, kind in labels if isinstance(kind.get("names"), list)}


def _named(value: Any, classes: list[str] | None) -> Any:
    if classes is not None and isinstance(value, int) and not isinstance(value, bool):
        return classes[value] if 0 <= value < len(classes) else None  # -1 is no class
    return plain_number(value)


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == PARQUET


def _schema(path: Path) -> Any:
    if _is_parquet(path):
        with pq.ParquetFile(path) as file:
            return file.schema_arrow
    with pa.OSFile(str(path)) as source:
        return _opened(source).schema


def _values(path: Path, read: list[str]) -> Iterator[dict[str, Any]]:
    if _is_parquet(path):
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(BATCH, columns=read):
                yield from batch.to_pylist()
        return
    with pa.memory_map(str(path)) as source:
        reader = _opened(source)
        is_stream = isinstance(reader, pa.RecordBatchStreamReader)
        batches = reader if is_stream else (reader.get_batch(number) for number in range(reader.num_record_batches))
        for batch in batches:
            chosen = batch.select(read)
            for start in range(0, len(chosen), BATCH):
                yield from chosen.slice(start, BATCH).to_pylist()


def _opened(source: Any) -> Any:
    """A reader of the stream that `datasets` saves, or of an Arrow file (Feather)."""
    start = source.read(len(ARROW_FILE))
    source.seek(0)
    return pa.ipc.open_file(source) if start == ARROW_FILE else pa.ipc.open_stream(source)
