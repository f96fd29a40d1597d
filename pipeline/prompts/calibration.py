"""Calibration: the temperature that makes probabilities of a router's scores.

Scores of different routers have different scales. The temperature is made of the kept keys, scored as though each had
been left out of the router (`Router.held_out_scores`), so it is a function of the set of tasks alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.prompts.routers.base import Router, States
from pipeline.prompts.routers.kept_keys import kept_keys

ENTRIES = 1 << 24  # most scores [n, T] that the temperature is found with
AT_ONCE = 1 << 13  # kept keys that are scored at once
STEPS = 60  # of Newton's method, each halving the bracket where Newton's own step leaves it


@dataclass(frozen=True)
class Calibration:
    """The temperature of a router's scores."""

    temperature: float

    def log_probabilities(self, scores: Tensor) -> Tensor:
        """Logarithms of the tasks' probabilities [N, T], softmax(scores / temperature), given the scores [N, T]."""
        return torch.log_softmax(scores.double() / self.temperature, dim=1).float()


def calibrate(router: Router, states: States) -> Calibration | None:
    """The calibration of a router on the kept keys of T tasks; None where a task has none."""
    kept = kept_keys(states)
    if kept is None:
        return None
    rows = kept.balanced(ENTRIES // len(states))
    tasks = kept.tasks[rows]
    weights = 1.0 / torch.bincount(tasks)[tasks].double()  # every task counts the same
    scores = torch.cat([router.held_out_scores(states, part) for part in rows.split(AT_ONCE)])
    return Calibration(temperature_of(scores, tasks, weights))


def temperature_of(scores: Tensor, tasks: Tensor, weights: Tensor) -> float:
    """The temperature that minimises the negative log-likelihood of softmax(scores / temperature).

    The likelihood is concave in the inverse temperature, whose optimum Newton's method finds between brackets. Where
    all samples are told apart it would be infinite, so each sample counts as another task's with the probability
    1 / (n + 2), as in Platt's scaling (Platt 1999, section 2.2).

    Args:
        scores: [n, T].
        tasks: [n] the samples' own tasks.
        weights: [n] how much each sample counts.
    """
    count, number = scores.shape
    if number < 2:
        return 1.0
    scores, weights = scores.double(), weights.double() / weights.double().sum()
    scores = scores - scores.mean(1, keepdim=True)
    doubt = 1.0 / (count + 2)
    # What the targets (own task 1 - doubt, the others doubt together) expect of the centred scores, per sample.
    own = scores.gather(1, tasks[:, None])[:, 0]
    expected = float((weights * (own * (1.0 - doubt) - own * doubt / (number - 1))).sum())
    widest = float(scores.abs().max())
    if widest == 0.0:
        return 1.0

    def slopes(inverse: float) -> tuple[float, float]:
        """First and second derivative of the negative log-likelihood."""
        shares = torch.softmax(scores * inverse, dim=1)
        mean = (shares * scores).sum(1)
        spread = (shares * scores**2).sum(1) - mean**2
        return float((weights * mean).sum()) - expected, float((weights * spread).sum())

    low, high = 1e-3 / widest, 1.0 / widest
    if slopes(low)[0] >= 0:  # the scores tell nothing: all tasks are about as probable
        return 1.0 / low
    return 1.0 / minimum(slopes, low, high, 1e9 / widest)


def minimum(slopes: Callable[[float], tuple[float, float]], low: float, high: float, most: float) -> float:
    """Where a convex function of one number is smallest, by Newton's method between brackets.

    Args:
        slopes: its first and second derivative.
        low: a number below the minimum.
        high: where the search for a number above it begins.
        most: beyond which that search ends.
    """
    while slopes(high)[0] < 0 and high < most:
        low, high = high, high * 4.0
    found = high
    for _ in range(STEPS):
        slope, curve = slopes(found)
        low, high = (found, high) if slope < 0 else (low, found)
        step = found - slope / curve if curve > 0 else low
        step = step if low < step < high else (low + high) / 2.0
        if abs(step - found) <= 1e-12 * found:
            break
        found = step
    return found
