"""Paths, sizes and modification times of image files: one stat() per distinct image, by many threads.

On a network file system stat() takes about a millisecond and many calls can run in parallel; a million calls one after
the other take a quarter of an hour. The result is stored beside the prepared split (`<split>.source.parquet`), so that
`check` and the processes that share a preparation neither read the source's text files nor call stat() for every image
again.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.files.atomic import replacing

THREADS, CHUNK = 32, 500  # parallel calls, and images per task of the thread pool


class ImageState(NamedTuple):
    """An image file: its path, size in bytes, and modification time in nanoseconds."""

    path: str
    size: int
    mtime_ns: int


def image_states(images: Iterable[str], folders: Sequence[Path]) -> dict[str, ImageState | None]:
    """Return the state of each image, looked up in the folders in order; None where no folder has it."""
    names, bases = list(dict.fromkeys(images)), [str(folder) for folder in folders]
    chunks = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        found = pool.map(lambda chunk: [_state(bases, name) for name in chunk], chunks)
        return {
            name: state
            for chunk, states in zip(chunks, found, strict=True)
            for name, state in zip(chunk, states, strict=True)
        }


def _state(bases: list[str], name: str) -> ImageState | None:
    for base in bases:
        path = os.path.join(base, name)
        try:
            status = os.stat(path)
        except (OSError, ValueError):  # ValueError: a null byte
            continue
        if stat.S_ISREG(status.st_mode):
            return ImageState(path, status.st_size, status.st_mtime_ns)
    return None


def source_state_file(folder: Path) -> Path:
    """The file beside a prepared split that holds the state of its source."""
    return folder.with_name(f"{folder.name}.source.parquet")


def store_source_state(
    folder: Path, fingerprint: str, files: Mapping[str, Any], states: Mapping[str, ImageState | None]
) -> None:
    """Store the state of a split's source: its fingerprint, its text files, and the sizes of its images."""
    import pyarrow as pa  # here: recipes load data formats where nothing is prepared and pyarrow is not installed
    import pyarrow.parquet as pq

    there = {name: state for name, state in states.items() if state is not None}
    table = pa.table(
        {
            "image": pa.array(list(there), pa.string()),
            "size": pa.array([state.size for state in there.values()], pa.int64()),
        }
    )
    facts = {"fingerprint": fingerprint, "files": json.dumps(dict(files))}
    with replacing(source_state_file(folder)) as temporary:
        pq.write_table(table.replace_schema_metadata(facts), temporary)


def stored_fingerprint(folder: Path, root: Path, names: Iterable[str]) -> str | None:
    """The stored fingerprint of the source; None unless size and modification time of its text files are unchanged."""
    import pyarrow as pa  # here: see `store_source_state`
    import pyarrow.parquet as pq

    try:
        facts = pq.read_schema(source_state_file(folder)).metadata or {}
        files, fingerprint = json.loads(facts[b"files"]), facts[b"fingerprint"].decode()
        for name in names:
            status, kept = os.stat(root / name), files.pop(name)
            if (status.st_size, status.st_mtime_ns) != (kept["size"], kept["mtime_ns"]):
                return None
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return None
    return None if files else fingerprint


def resized_images(folder: Path, folders: Sequence[Path]) -> list[str]:
    """Images of a split's source whose size changed since it was prepared, without those that no longer exist."""
    import pyarrow as pa  # here: see `store_source_state`
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(source_state_file(folder))
    except (OSError, pa.ArrowInvalid):
        return []
    sizes = dict(zip(table["image"].to_pylist(), table["size"].to_pylist(), strict=True))
    now = image_states(sizes, folders)
    return [name for name, state in now.items() if state is not None and state.size != sizes[name]]
