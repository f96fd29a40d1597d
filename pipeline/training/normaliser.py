"""What the sums of a micro-batch are divided by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Normaliser:
    """Counts of the whole optimizer step over all ranks, which the sums of a micro-batch are divided by.

    `scale` undoes DeepSpeed's mean over ranks and accumulation steps, so that the step's gradient is that of the
    global mean.
    """

    tokens: float
    samples: float
    scale: float = 1.0
