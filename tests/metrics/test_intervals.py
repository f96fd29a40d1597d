"""Confidence intervals: published examples, limits, and the mean over test sets."""

from __future__ import annotations

import math
import random

import pytest

from pipeline.metrics.intervals import interval, mean_interval, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0.0, 16.11), (1, 29, 0.61, 17.18)],
)
def test_wilsons_interval_is_that_of_published_examples(right: int, total: int, low: float, high: float) -> None:
    assert wilson(right, total) == (pytest.approx(low, abs=0.006), pytest.approx(high, abs=0.006))


def test_all_right_and_all_wrong_have_an_interval_that_stays_within_the_range() -> None:
    low, high = interval([1.0] * 300) or (0.0, 0.0)
    assert (round(low, 1), high) == (98.7, pytest.approx(100.0))
    assert interval([0.0] * 300) == (pytest.approx(0.0), pytest.approx(100 - low))


def test_points_between_zero_and_one_have_the_interval_of_a_mean() -> None:
    points = [0.0, 1 / 3, 2 / 3, 1.0] * 25
    low, high = interval(points) or (0.0, 0.0)
    error = math.sqrt(sum((point - 0.5) ** 2 for point in points) / 99 / 100)
    assert (low, high) == (pytest.approx(50 - 196 * error, abs=0.01), pytest.approx(50 + 196 * error, abs=0.01))


def test_too_few_answers_have_none() -> None:
    assert wilson(0, 0) is None
    assert interval([]) is None
    assert interval([0.5]) is None


def test_a_mean_over_test_sets_is_surer_than_each_of_them() -> None:
    limits = wilson(150, 300)
    assert limits is not None
    low, high = mean_interval([50.0] * 4, [limits] * 4) or (0.0, 0.0)
    assert high - low == pytest.approx((limits[1] - limits[0]) / 2)
    assert mean_interval([50.0, None], [limits, limits]) is None
    assert mean_interval([50.0, 50.0], [limits, None]) is None
    assert mean_interval([], []) is None


def test_the_mean_of_the_truth_lies_within_the_interval_nearly_always() -> None:
    draw, shares, inside = random.Random(7), (0.98, 0.75, 0.4), 0
    for _ in range(500):
        right = [sum(draw.random() < share for _ in range(100)) for share in shares]
        found = mean_interval([float(count) for count in right], [wilson(count, 100) for count in right])
        assert found is not None
        inside += found[0] <= 100 * sum(shares) / 3 <= found[1]
    assert 0.92 <= inside / 500 <= 0.98
