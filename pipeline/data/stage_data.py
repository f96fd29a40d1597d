"""The samples of a stage: those of one or several tasks, concatenated, with their keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.data.keys import Keys, PickedKeys, join_keys
from pipeline.data.sample import Sample

if TYPE_CHECKING:
    from pipeline.data.ids import Ids


class Samples(Protocol):
    """A list of samples, such as `IndexedShards`, with what its index says of them."""

    @property
    def ids(self) -> Sequence[str]: ...

    @property
    def lengths(self) -> npt.NDArray[np.int64]: ...

    @property
    def question_chars(self) -> npt.NDArray[np.int32]: ...

    @property
    def sizes(self) -> npt.NDArray[np.int32]: ...

    def text(self, index: int, /) -> Sample: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class StageData:
    """Samples of one or more tasks, concatenated, with their keys; each part has a limit or None."""

    def __init__(self, parts: Sequence[tuple[Samples, Keys | PickedKeys, int | None]]) -> None:
        counts = [min(len(samples), limit or len(samples)) for samples, _, limit in parts]
        self._samples = [samples for samples, _, _ in parts]
        self._starts = [0, *accumulate(counts)]
        left_out = [
            start + row
            for samples, start, count in zip(self._samples, self._starts, counts, strict=False)
            for row in getattr(samples, "left_out", ())
            if row < count
        ]
        # Indices of the samples that training uses; None: all. See data.too_long.
        self.used: npt.NDArray[np.int64] | None = None
        if left_out:
            self.used = np.setdiff1d(np.arange(self._starts[-1]), left_out)
        # Identifies the data: fingerprints of the parts, where they have any.
        self.fingerprint = "+".join(str(getattr(samples, "fingerprint", "")) for samples in self._samples)
        self.keys = join_keys([(keys, count) for (_, keys, _), count in zip(parts, counts, strict=True)])

    @cached_property
    def ids(self) -> Ids:
        """Ids of the samples [N]."""
        from pipeline.data.ids import Ids  # here: answering, which needs no ids, works without pyarrow

        return Ids.joined([samples.ids[:count] for samples, count in self._counted()])

    def question_chars(self) -> npt.NDArray[np.int32]:
        """Characters of each sample's question [N]."""
        return np.concatenate([samples.question_chars[:count] for samples, count in self._counted()])

    def sizes(self) -> npt.NDArray[np.int32]:
        """Width and height of each sample's image [N, 2], 0 without one."""
        return np.concatenate([samples.sizes[:count] for samples, count in self._counted()])

    def lengths(self) -> npt.NDArray[np.int64]:
        """Lengths [N] to sort samples by: characters of question and answer.

        Those with an image get an offset, so that they come after all without one.
        """
        characters = [samples.lengths[:count] for samples, count in self._counted()]
        longest = max(int(part.max(initial=0)) for part in characters) + 1
        return np.concatenate(characters) + longest * self.keys.has_image.numpy()

    def _counted(self) -> list[tuple[Samples, int]]:
        """The samples of each part and the number of them that are used."""
        return list(zip(self._samples, np.diff(self._starts).tolist(), strict=True))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        samples, row = self._place(index)
        return samples[row]

    def text(self, index: int) -> Sample:
        """A sample without the bytes of its image (`keys.has_image` tells whether it has one)."""
        samples, row = self._place(index)
        return samples.text(row)

    def _place(self, index: int) -> tuple[Samples, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._samples[part], index - self._starts[part]
