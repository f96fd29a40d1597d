"""Confidence intervals of scores in percent: of one test set, and of the mean over several.

The interval of a share of right answers is Wilson's (1927), which stays within 0 and 100 and holds its level near both
ends, where the standard error is zero. Answers with points between 0 and 1 have the interval of a mean. Intervals of
test sets are combined by Zou and Donner's rule (2008), which uses the distance of each limit from its score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev

Interval = tuple[float, float]  # lower and upper limit in percent

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)  # 1.96: standard errors on either side


def wilson(right: float, total: int) -> Interval | None:
    """Wilson's interval of `right` of `total` answers; None without answers.

    `right` may be fractional: the mean over seeds that were tested with the same samples.
    """
    if total <= 0:
        return None
    share, shrunk = right / total, 1 + Z**2 / total
    centre = (share + Z**2 / (2 * total)) / shrunk
    half = Z / shrunk * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def interval(points: Sequence[float]) -> Interval | None:
    """The interval of a test set's score, from the points of its answers, 0 to 1 each.

    None where there are too few answers for one.
    """
    if all(point in (0.0, 1.0) for point in points):
        return wilson(sum(points), len(points))
    if len(points) < 2:
        return None
    centre, half = mean(points), Z * stdev(points) / math.sqrt(len(points))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def mean_interval(scores: Sequence[float | None], intervals: Sequence[Interval | None]) -> Interval | None:
    """The interval of the mean of independent scores in percent; None where a score or its interval is missing."""
    low, high, total = 0.0, 0.0, 0.0
    for score, limits in zip(scores, intervals, strict=True):
        if score is None or limits is None:
            return None
        low, high, total = low + (score - limits[0]) ** 2, high + (limits[1] - score) ** 2, total + score
    if not scores:
        return None
    return (total - math.sqrt(low)) / len(scores), (total + math.sqrt(high)) / len(scores)
