"""The score of a test set by the metric that its task names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.config import registry
from pipeline.errors import UserError, nearest
from pipeline.metrics.metric import Answered, Meta, Metric, PerAnswer, TaskScore

__all__ = ["Answered", "TaskScore", "metric_names", "metric_of", "require_metrics", "score", "score_task"]


def metric_names() -> list[str]:
    """Every name that a task's `metric` may have."""
    return sorted(registry.names("metrics"))


def metric_of(name: str) -> Metric:
    """The metric of that name; UserError for an unknown one."""
    if not registry.knows("metrics", name):
        known = metric_names()
        raise UserError(
            f"Unknown metric '{name}'.{nearest(name, known)} Expected one of: {', '.join(known)}. "
            "Change the task's `metric` in the recipe."
        )
    found: Metric = registry.load("metrics", name)
    return found


def require_metrics(names: Sequence[str]) -> None:
    """Raise UserError when a package that one of these metrics needs is not installed."""
    for name in dict.fromkeys(names):
        metric_of(name).require()


def score_task(metric: str, answered: Sequence[Answered], scoring: str = "fixed") -> TaskScore:
    """Score a test set with the named metric; `scoring` is "fixed" or "compat" (see `data.scoring`).

    CIDEr counts in percent of 1 as it is published, so it may pass 100. Raises UserError for an unknown metric, a
    missing package, and a metric that does not give every sample a number.
    """
    scored = metric_of(metric).score(answered, scoring)
    if len(scored.points) != len(answered):
        raise UserError(
            f"The metric {metric} gave {len(scored.points)} points to {len(answered)} answers; expected one each."
        )
    if not all(map(math.isfinite, (scored.percent, *scored.parts.values(), *scored.points))):
        raise UserError(f"The metric {metric} gave a score that is no finite number; correct the metric.")
    return scored


def score(metric: str, prediction: str, answer: str, meta: Meta | None = None, scoring: str = "fixed") -> float:
    """Score one prediction with the named metric, in [0, 1]; UserError for an unknown metric or one of whole sets."""
    named = metric_of(metric)
    if not isinstance(named, PerAnswer):
        raise UserError(f"The metric {metric} scores whole test sets; expected one that scores each answer.")
    return named(prediction, answer, meta, scoring)
