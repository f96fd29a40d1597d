"""Tells prepared data whose pictures are used as they are stored from data that holds turned or transparent ones.

Earlier versions used every picture as it was stored. What they prepared, computed and answered is right where no
picture has an EXIF orientation, transparency or 16 bits, and wrong elsewhere. `dataset.json` counts such pictures, and
where there are any its fingerprint says that they are upright and on white, so that nothing made of the stored ones is
taken for the same data. Data prepared before has no count: it is looked through once.
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

CHANGED = "changed_pictures"  # in dataset.json: how many pictures are not used as they are stored
UPRIGHT = "pictures upright and on white"  # in the fingerprint, where there are any
HEAD_BYTES = 64 << 10  # of a JPEG, whose orientation stands in front of its pixels
SUBMITTED = 4096  # rows at a time: a thread pool keeps a kilobyte for each
THREADS = 16  # most of the time is spent waiting for the file system


def changed_pictures(description: Mapping[str, Any]) -> int:
    """How many pictures of a split are turned, laid on white or brought to 8 bits; 0 for data prepared before."""
    return int(description.get(CHANGED) or 0)


def require_upright(shards: IndexedShards) -> None:
    """Raise UserError for a split of an earlier version with pictures that it used as they are stored.

    What was found out is noted in dataset.json where that can be written.
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
    with contextlib.suppress(OSError):  # a folder that can only be read is looked through every time
        _note(shards.folder / DATASET_FILE, shards.fingerprint)


def _plain(shards: IndexedShards, row: int, name: str) -> bool:
    try:
        if name == "JPEG":
            with contextlib.suppress(Exception):  # a header longer than this
                return is_plain(shards.image_bytes(row, HEAD_BYTES))
        return is_plain(shards.image_bytes(row))
    except UserError:
        raise
    except Exception:  # Pillow raises many kinds for damaged files, which those say who decode them
        return True


def _note(path: Path, fingerprint: str) -> None:
    description = json.loads(path.read_text("utf-8"))
    if CHANGED in description or description["fingerprint"] != fingerprint:
        return  # it was prepared anew while this process looked
    description[CHANGED] = 0
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", "utf-8")
