"""What may change the scores of the tokens that a decoder chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Weigh(Protocol):
    """What changes the scores of the next tokens of one answer in progress."""

    @classmethod
    def weighed(cls, rows: Sequence[Any], so_far: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """The scores [n, V] of n rows that have such objects, given the tokens of their answers so far."""
        ...
