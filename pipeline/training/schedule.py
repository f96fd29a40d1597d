"""The number of optimizer steps of a stage, and the learning rate of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config.train import TrainConfig


@dataclass(frozen=True)
class LearningRate:
    """The learning rates of a stage: every rate of the optimizer is multiplied by the step's factor."""

    highest: float  # the base rate, which is logged multiplied by the factor
    factor: Callable[[int], float]  # by step, 0-based


def total_steps(config: TrainConfig, batches_per_epoch: int) -> int:
    """The number of optimizer steps of a stage."""
    return config.steps or max(1, round(config.epochs * batches_per_epoch))


def schedule(config: TrainConfig, step: int, total: int) -> float:
    """The factor of the learning rates at a step (0-based) of `total`: warm-up, then constant, cosine or linear to 0.

    The warm-up is linear, or logarithmic as DeepSpeed's WarmupLR, whose first step has rate 0 (docs/design.md 4.9).
    """
    warmup = math.ceil(config.warmup * total)
    if step < warmup:
        log_warmup = config.warmup_curve == "log"
        return math.log(step + 1) / math.log(max(2, warmup)) if log_warmup else (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
