"""Predictions of an evaluation by position: an index of a file's lines is made once, and a page reads only its own.

An index has 21 bytes per line, so a million predictions take 21 MB. It is made in one background thread; a request that
comes before it is ready waits `PATIENCE_S` and then gets its progress.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.errors import PipelineError

PATIENCE_S = 2.0
MOST_INDEXES, MOST_SEARCHES = 128, 64
SEARCHED = ("id", "question", "prediction", "answer")
NONE = -1
Rows = npt.NDArray[np.int64]
Made = TypeVar("Made")


class Unready(PipelineError):
    """An index or a search is still being made; `share` of it in percent is done."""

    def __init__(self, share: float) -> None:
        super().__init__(f"{share:.0f} % of the predictions are read")
        self.share = share


@dataclass(frozen=True)
class Index:
    """The lines of one file of predictions, those that are damaged or unfinished left out."""

    path: Path
    offsets: Rows  # [N] of the lines in the file, in bytes
    lengths: npt.NDArray[np.int32]  # [N] in bytes
    scores: npt.NDArray[np.float32]  # [N] in [0, 1], NaN where there is none
    first: npt.NDArray[np.int32]  # [N] the set with the highest similarity, NONE without similarities
    unfamiliar: npt.NDArray[np.bool_]  # [N]
    damaged: int  # lines that were left out

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return sum(array.nbytes for array in (self.offsets, self.lengths, self.scores, self.first, self.unfamiliar))

    def lines(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """The predictions at these places; {} for one that the file does not have any more."""
        found: list[dict[str, Any]] = []
        with self.path.open("rb") as file:
            for row in rows:
                file.seek(int(self.offsets[row]))
                found.append(_record(file.read(int(self.lengths[row]))) or {})
        return found


@dataclass
class _Progress:
    read: int = 0
    size: int = 1


@dataclass
class _Kept:
    """What was made or is being made, the least recently used first."""

    most: int
    entries: OrderedDict[Any, tuple[Future[Any], _Progress]] = field(default_factory=OrderedDict)


class Predictions:
    """The indexes and searches of all files, made when they are first asked for and again when a file has changed."""

    def __init__(self, patience: float = PATIENCE_S) -> None:
        self._patience, self._guard = patience, threading.Lock()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="index")
        self._indexes, self._searches = _Kept(MOST_INDEXES), _Kept(MOST_SEARCHES)

    def index(self, path: Path) -> Index:
        """The index of a file; raises Unready while it is made, OSError for a file that cannot be read."""
        return self._made(self._indexes, _version(path), lambda progress: _index(path, progress))

    def matching(self, index: Index, text: str) -> Rows:
        """The places of lines that have the text in a field of SEARCHED, whatever the case; errors as for `index`."""
        key = (*_version(index.path), text.casefold())
        return self._made(self._searches, key, lambda progress: _search(index, text, progress))

    def close(self) -> None:
        """Stop making indexes; for the end of the server."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _made(self, kept: _Kept, key: Any, make: Callable[[_Progress], Made]) -> Made:
        with self._guard:
            found = kept.entries.get(key)
            if found is None or (found[0].done() and found[0].exception() is not None):
                progress = _Progress()
                found = kept.entries[key] = self._worker.submit(make, progress), progress
                while len(kept.entries) > kept.most:
                    kept.entries.popitem(last=False)
            kept.entries.move_to_end(key)
        try:
            return found[0].result(self._patience)
        except TimeoutError:
            raise Unready(100.0 * found[1].read / found[1].size) from None


def _version(path: Path) -> tuple[str, int, int]:
    about = path.stat()
    return str(path), about.st_mtime_ns, about.st_size


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _index(path: Path, progress: _Progress) -> Index:
    offsets, lengths, scores, first, unfamiliar = [], [], [], [], []
    damaged = place = 0
    progress.size = max(1, path.stat().st_size)
    with path.open("rb") as file:
        for line in file:
            record = _record(line)
            if record is None:
                damaged += bool(line.strip())
            else:
                offsets.append(place)
                lengths.append(len(line))
                score = record.get("score")
                scores.append(float(score) if isinstance(score, int | float) else float("nan"))
                first.append(_highest(record.get("similarity")))
                unfamiliar.append(record.get("unfamiliar") is True)
            place += len(line)
            progress.read = place
    return Index(
        path,
        np.array(offsets, np.int64),
        np.array(lengths, np.int32),
        np.array(scores, np.float32),
        np.array(first, np.int32),
        np.array(unfamiliar, np.bool_),
        damaged,
    )


def _highest(similarity: Any) -> int:
    """The place of the largest of a list of numbers; NONE for anything else."""
    try:
        return max(range(len(similarity)), key=similarity.__getitem__, default=NONE)
    except (TypeError, KeyError):
        return NONE


def _search(index: Index, text: str, progress: _Progress) -> Rows:
    needle, hits, row = text.casefold(), [], 0
    # Most lines have the text nowhere, which is seen without parsing them.
    written = {json.dumps(needle, ensure_ascii=escaped)[1:-1].casefold() for escaped in (False, True)}
    offsets, place = index.offsets.tolist(), 0
    progress.size = max(1, len(offsets))
    with index.path.open("rb") as file:
        for line in file:
            if row < len(offsets) and place == offsets[row]:
                said = line.decode("utf-8", "replace").casefold()
                if any(form in said for form in written):
                    record = _record(line) or {}
                    if any(needle in str(record.get(name, "")).casefold() for name in SEARCHED):
                        hits.append(row)
                row += 1
                progress.read = row
            place += len(line)
    return np.array(hits, np.int64)
