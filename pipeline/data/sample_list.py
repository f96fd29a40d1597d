"""Samples in memory, such as the questions of a request."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipeline.data.pictures import read_header
from pipeline.data.sample import Sample


class SampleList(list[Sample]):
    """Samples in memory with the interface of a prepared split."""

    @property
    def ids(self) -> list[str]:
        return [sample.id for sample in self]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(sample.question) + len(sample.answer) for sample in self], dtype=np.int64)

    @property
    def question_chars(self) -> npt.NDArray[np.int32]:
        return np.array([len(sample.question) for sample in self], dtype=np.int32)

    @property
    def sizes(self) -> npt.NDArray[np.int32]:
        headers = [None if sample.image is None else read_header(sample.image) for sample in self]
        sizes = [(0, 0) if header is None else (header.width, header.height) for header in headers]
        return np.array(sizes, dtype=np.int32).reshape(-1, 2)

    def text(self, index: int) -> Sample:
        return replace(self[index], image=None)
