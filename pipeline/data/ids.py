"""Sample ids in Arrow memory; ten million of them as Python strings would take nearly a gigabyte on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

AT_ONCE = 1 << 16  # ids that are converted to Python strings at once during iteration


class Ids(Sequence[str]):
    """A read-only list of strings; a slice shares the memory."""

    def __init__(self, strings: Sequence[str] | pa.ChunkedArray) -> None:
        if isinstance(strings, Ids):
            strings = strings._strings
        elif not isinstance(strings, pa.ChunkedArray):
            strings = pa.chunked_array([pa.array(strings, pa.string())])
        self._strings: pa.ChunkedArray = strings

    @classmethod
    def joined(cls, parts: Sequence[Sequence[str]]) -> Ids:
        """The concatenated ids of several lists; those of `Ids` are not copied."""
        chunks = [chunk for part in parts for chunk in Ids(part)._strings.chunks]
        return cls(pa.chunked_array(chunks, pa.string()))

    def only(self, rows: npt.NDArray[np.int64]) -> Ids:
        """The ids at `rows`."""
        return Ids(self._strings.take(pa.array(rows)))

    def __len__(self) -> int:
        return len(self._strings)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Ids: ...

    def __getitem__(self, index: int | slice) -> str | Ids:
        if isinstance(index, slice):
            return Ids(self._strings[index])
        return self._strings[int(range(len(self))[index])].as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE):
            yield from self._strings[start : start + AT_ONCE].to_pylist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Ids):
            return self._strings.equals(other._strings)
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Ids({list(self[:5])}{' ...' if len(self) > 5 else ''}, {len(self)} in all)"
