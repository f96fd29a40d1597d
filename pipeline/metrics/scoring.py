"""The score of a whole test set: the mean of its answers' scores, or what a corpus metric says of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.metrics import answers, captions


@dataclass(frozen=True)
class Answered:
    """A test sample with what the model answered."""

    prediction: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)
    has_image: bool = True


@dataclass(frozen=True)
class TaskScore:
    """What a test set scored: in percent, by part (percent), and for every sample (a share of 1)."""

    percent: float
    parts: dict[str, float]
    points: list[float]


def metric_names() -> list[str]:
    """Every name a task's `metric` may have."""
    return sorted([*answers.METRICS, *captions.METRICS])


def require_metrics(names: Sequence[str]) -> None:
    """Raise UserError when a package that one of these metrics needs is not installed."""
    if any(name in captions.METRICS for name in names):
        captions.require()


def score_task(metric: str, answered: Sequence[Answered], scoring: str = "fixed") -> TaskScore:
    """Score a test set with the named metric; `scoring` is "fixed" or "compat" (see `answers.score`).

    A test set with and without images has the parts `image` and `text` (ScienceQA's IMG accuracy, spec 7.1); captions
    have one part per measure. CIDEr counts in percent of 1 as it is published, so it may pass 100. Raises UserError
    for an unknown metric or a missing package.
    """
    if metric in captions.METRICS:
        return _captions(metric, answered)
    points = [answers.score(metric, item.prediction, item.answer, item.meta, scoring) for item in answered]
    split = {
        name: [value for value, item in zip(points, answered, strict=True) if item.has_image == with_image]
        for name, with_image in (("image", True), ("text", False))
    }
    parts = {name: _percent(values) for name, values in split.items()} if all(split.values()) else {}
    return TaskScore(_percent(points), parts, points)


def _captions(metric: str, answered: Sequence[Answered]) -> TaskScore:
    if not answered:
        return TaskScore(0.0, {}, [])
    totals, each = captions.caption_scores(
        [item.prediction for item in answered], [answers.references(item.answer, item.meta) for item in answered]
    )
    names = captions.METRICS[metric]
    points = [sum(values) / len(names) for values in zip(*(each[name] for name in names), strict=True)]
    percent = 100.0 * sum(totals[name] for name in names) / len(names)
    return TaskScore(percent, {name: 100.0 * value for name, value in totals.items()}, points)


def _percent(points: Sequence[float]) -> float:
    return 100.0 * sum(points) / max(1, len(points))
