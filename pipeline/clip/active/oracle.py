"""Who answers with the label of an image: the only way from a pool's labels into a selection or a training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pipeline.clip.active.pool import Rows


class Oracle(Protocol):
    """Gives the labels of the rows of a pool that are asked for."""

    def answers(self, rows: Rows) -> list[int]:
        """The label of each row; `UNLABELLED` for an image of none of the classes."""
        ...


class SplitOracle:
    """Answers with the labels of the training split, as benchmarks do."""

    def __init__(self, labels: Sequence[int]) -> None:
        self._labels = labels

    def answers(self, rows: Rows) -> list[int]:
        return [self._labels[row] for row in rows]
