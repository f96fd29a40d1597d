"""The divisors of a micro-batch's loss sums (docs/design.md 3.4)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Normaliser:
    """The numbers of answer tokens and samples of an optimizer step over all ranks, which divide the loss sums.

    `scale` cancels DeepSpeed's mean over ranks and accumulation steps, so that the step's gradient is that of the
    global mean.
    """

    tokens: float
    samples: float
    scale: float = 1.0
