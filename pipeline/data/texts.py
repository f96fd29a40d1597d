"""The texts of a test set in memory, without images, for scoring after every stage."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pipeline.data.sample import Sample
from pipeline.data.stage_data import StageData

READERS = 8  # threads; they mostly wait for the file system
AT_ONCE = 2048  # samples that are submitted to them at once


class Texts:
    """The samples of a `StageData` without their images, read at the first iteration.

    They are kept as JSON, because Python objects would take several times the memory.
    """

    def __init__(self, data: StageData) -> None:
        self.data = data
        self._records: list[bytes] | None = None

    def __iter__(self) -> Iterator[Sample]:
        if self._records is None:
            self._records = self._read()
        return (Sample.from_json(record, None) for record in self._records)

    def _read(self) -> list[bytes]:
        records: list[bytes] = []
        with ThreadPoolExecutor(READERS) as readers:
            for start in range(0, len(self.data), AT_ONCE):
                numbers = range(start, min(start + AT_ONCE, len(self.data)))
                records += readers.map(lambda number: self.data.text(number).to_json(), numbers)
        return records
