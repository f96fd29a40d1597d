"""What a selection sees of a pool of images: features, predictions, and which rows are labelled; never a label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

Array = npt.NDArray[np.float64]
Rows = Sequence[int]


@dataclass(frozen=True)
class PoolView:
    """A pool of N images as the current model sees it.

    `features` [N, J] of unit length and `logits` [N, K], both in float64; `labelled` are the rows whose labels are
    known, in the order in which they were asked for, `unlabelled` all others, ascending.
    """

    features: Array
    logits: Array
    labelled: tuple[int, ...]
    unlabelled: tuple[int, ...]

    @classmethod
    def of(cls, features: Any, logits: Any, labelled: Rows, unlabelled: Rows | None = None) -> PoolView:
        """The view of arrays or tensors on the CPU of any precision; features are brought to unit length.

        `unlabelled`: None stands for all rows that are not labelled.
        """
        features, logits = (np.asarray(values, dtype=np.float64) for values in (features, logits))
        known = set(labelled)
        rest = [row for row in range(len(features)) if row not in known] if unlabelled is None else unlabelled
        return cls(unit_length(features), logits, tuple(labelled), tuple(rest))

    def probabilities(self, rows: Rows) -> Array:
        """Predicted probabilities [R, K] of the rows."""
        return softmax(self.logits[np.asarray(rows, dtype=np.int64)])

    def guesses(self, rows: Rows) -> list[int]:
        """The most likely class of each row; the lowest of equally likely ones."""
        found: list[int] = self.logits[np.asarray(rows, dtype=np.int64)].argmax(axis=1).tolist()
        return found

    def refuse_broken(self, names: Sequence[str]) -> None:
        """Raise UserError that names the first image whose features or logits are not finite numbers."""
        broken = ~(np.isfinite(self.features).all(axis=1) & np.isfinite(self.logits).all(axis=1))
        if broken.any():
            raise UserError(
                f"The model gives no finite features or predictions for {int(broken.sum())} images of the pool, the "
                f"first is {names[int(broken.argmax())]}; nothing can be selected by them. Check these images, or "
                "train with a smaller learning rate."
            )


def unit_length(vectors: Array) -> Array:
    """Rows [N, J] divided by their lengths; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    result: Array = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths != 0)
    return result


def softmax(logits: Array) -> Array:
    """Probabilities [N, K]."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Array = shifted / shifted.sum(axis=1, keepdims=True)
    return result
