"""Scores of a benchmark: accuracies, harmonic means, mean and deviation over seeds (docs/design.md 5.13)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Correct and total predictions by class, as integers, so that means are not computed from rounded percentages."""

    right: tuple[int, ...]
    total: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Share of correct predictions, in [0, 1]."""
        return sum(self.right) / max(1, sum(self.total))

    def per_class(self) -> list[float | None]:
        """Share of correct predictions by class, in [0, 1]; None for a class without images."""
        return [right / total if total else None for right, total in zip(self.right, self.total, strict=True)]


def count(predictions: Sequence[int], labels: Sequence[int], classes: int) -> Counts:
    """Correct and total predictions by class."""
    right, total = [0] * classes, [0] * classes
    for prediction, label in zip(predictions, labels, strict=True):
        total[label] += 1
        right[label] += prediction == label
    return Counts(tuple(right), tuple(total))


def harmonic_mean(base: float, new: float) -> float:
    """2 b n / (b + n); 0 when both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation of one seed is None."""

    mean: float
    deviation: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class BaseToNew:
    """Base and new accuracy of one dataset over seeds.

    `harmonic` is the harmonic mean of the mean accuracies, as in published tables; `harmonic_of_seeds` are mean and
    deviation of each seed's harmonic mean.
    """

    base: Spread
    new: Spread
    harmonic_of_seeds: Spread

    @property
    def harmonic(self) -> float:
        return harmonic_mean(self.base.mean, self.new.mean)


def base_to_new(rows: Sequence[tuple[float, float]]) -> BaseToNew:
    """The summary of one dataset from its (base, new) accuracies, one row per seed."""
    base, new = ([row[side] for row in rows] for side in (0, 1))
    return BaseToNew(Spread.of(base), Spread.of(new), Spread.of([harmonic_mean(b, n) for b, n in rows]))


@dataclass(frozen=True)
class Average:
    """Averages over datasets; published tables give `harmonic_of_means`, up to 0.8 points above `mean_of_harmonics`."""

    base: float
    new: float
    harmonic_of_means: float
    mean_of_harmonics: float


def average(datasets: Mapping[str, BaseToNew]) -> Average:
    """The average row over datasets, with both harmonic means."""
    base = statistics.fmean(result.base.mean for result in datasets.values())
    new = statistics.fmean(result.new.mean for result in datasets.values())
    harmonics = statistics.fmean(result.harmonic for result in datasets.values())
    return Average(base, new, harmonic_mean(base, new), harmonics)
