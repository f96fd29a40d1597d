"""Detects prepared data with pictures that earlier versions decoded wrongly: rotated, transparent or of 16 bits.

Earlier versions ignored EXIF orientation, transparency and bit depth, so their keys and answers are wrong for such
pictures and right for all others. `dataset.json` records the number of such pictures, and where there are any the
dataset's fingerprint differs from that of earlier versions, so that their results are not reused. Data from earlier
versions has no such number and is examined once.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.data.pictures import is_plain
from pipeline.data.shards import DATASET_FILE, IndexedShards, read_index
from pipeline.errors import UserError
from pipeline.files.atomic import replacing

CHANGED = "changed_pictures"  # field of dataset.json: number of pictures that are not used as they are stored
UPRIGHT = "pictures upright and on white"  # part of the hashed text of the fingerprint, where there are any
HEAD_BYTES = 64 << 10  # bytes of a JPEG that are read, as its orientation precedes its pixels
SUBMITTED = 4096  # rows that are submitted at once, because a thread pool needs a kilobyte for each
THREADS = 16  # they mostly wait for the file system


def changed_pictures(description: Mapping[str, Any]) -> int:
    """The number of pictures of a split that are not used as stored; 0 for data from earlier versions."""
    return int(description.get(CHANGED) or 0)


def require_upright(shards: IndexedShards) -> None:
    """Raise UserError for a split of an earlier version with pictures that it decoded wrongly.

    Without such pictures, that is recorded in dataset.json if the file can be written.
    """
    if CHANGED in shards.description:
        return
    formats = read_index(shards.folder, shards.description)["image_format"].to_pylist()
    rows = [row for row, name in enumerate(formats) if name is not None]
    other: list[int] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(rows), SUBMITTED):
            part = rows[start : start + SUBMITTED]
            plain = pool.map(lambda row: _plain(shards, row, formats[row]), part)
            other += [row for row, same in zip(part, plain, strict=True) if not same]
    if other:
        raise UserError(
            f"{len(other)} pictures in {shards.folder} (the first is that of sample {shards.ids[other[0]]!r}) have an "
            "EXIF orientation, transparency or 16 bits and were prepared by a version that used them as they are "
            "stored, lying or black. Run `python -m pipeline prepare RECIPE` to prepare this data anew; stages that "
            "were trained with it belong to the old pictures and need another run folder."
        )
    shards.description[CHANGED] = 0
    with contextlib.suppress(OSError):  # a read-only folder is examined again every time
        _note(shards.folder / DATASET_FILE, shards.fingerprint)


def _plain(shards: IndexedShards, row: int, name: str) -> bool:
    try:
        if name == "JPEG":
            with contextlib.suppress(Exception):  # the header is longer than HEAD_BYTES
                return is_plain(shards.image_bytes(row, HEAD_BYTES))
        return is_plain(shards.image_bytes(row))
    except UserError:
        raise
    except Exception:  # Pillow raises many kinds of errors for damaged files; decoding the sample reports it
        return True


def _note(path: Path, fingerprint: str) -> None:
    description = json.loads(path.read_text("utf-8"))
    if CHANGED in description or description["fingerprint"] != fingerprint:
        return  # it was prepared again meanwhile
    description[CHANGED] = 0
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", "utf-8")
