"""The gate or the share with which the newest set stays out of the questions of earlier tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pipeline.config.method import MethodOptions
from pipeline.data.selection import Selection
from pipeline.methods import make_method
from pipeline.prompts.routing import Routing

NOTICED = 1.0  # percent of an earlier task's samples; smaller shares are tolerated
STEP = 0.001  # resolution of suggested gates and shares

Option = Literal["gate", "share"]


@dataclass(frozen=True)
class Similarities:
    """How one earlier task's samples fit all tasks, the newest last.

    `scores` [N, T] are what the selection rule is given: the router's scores, or the logarithms of its probabilities.
    Samples in `bare` [N] get no set whatever their scores (None: none of them).
    """

    task: str
    number: int
    scores: Tensor
    has_image: Tensor  # [N]
    bare: Tensor | None = None

    def selection(self, method: MethodOptions) -> Selection:
        """The sets that each sample gets."""
        routing: Routing = make_method(method).routing
        chosen = routing.inference(self.scores, self.number, self.has_image)
        return chosen if self.bare is None else chosen.without(self.bare)

    def inserted(self, method: MethodOptions) -> Tensor:
        """Whether each sample [N] receives the newest set."""
        return (self.selection(method).numbers == self.scores.shape[1] - 1).any(1)

    def behind(self) -> Tensor:
        """The best earlier set's score minus the newest set's [N]; below 0 where the newest ranks first."""
        return self.scores[:, :-1].amax(1) - self.scores[:, -1]


@dataclass(frozen=True)
class Limit:
    """A gate or a share with which few samples of the earlier tasks receive the newest set.

    `remaining` are the measured percentages of each task's samples that still receive it.
    """

    option: Option
    value: float
    remaining: dict[str, float]


def changed(before: Selection, after: Selection) -> Tensor:
    """Whether the sets of each sample [N] differ between two selections."""
    joined = Selection.joined([before, after]).numbers  # filled up to the same width
    return (joined[: len(before)] != joined[len(before) :]).any(1)


def without_newest(method: MethodOptions, tasks: Sequence[Similarities], option: Option) -> Limit | None:
    """The suggestion for this option; None where the method's own value suffices or nothing has to be kept out."""
    value = (keeping_gate if option == "gate" else keeping_share)(method, tasks)
    if value is None:
        return None
    limited = _limited(method, option, value)
    return Limit(option, value, {similar.task: percent(similar.inserted(limited)) for similar in tasks})


def _limited(method: MethodOptions, option: Option, value: float | None) -> MethodOptions:
    """The method with this gate or share alone, of which a rule takes one."""
    both: dict[str, float | None] = {name: None for name in ("gate", "share") if hasattr(method, name)}
    return method.model_copy(update={**both, option: value})


def keeping_gate(method: MethodOptions, tasks: Sequence[Similarities]) -> float | None:
    """The largest gate with which at most `NOTICED` percent of each task's samples receive the newest set.

    None where the method's gate is already small enough.
    """
    own = getattr(method, "gate", None)
    limit = _distance(_limited(method, "gate", None), tasks, math.inf if own is None else own)
    if limit is None:
        return None
    steps = max(0, math.ceil(limit / STEP) - 1)  # below the limit
    return _first_that_keeps(lambda value: _limited(method, "gate", value), tasks, range(steps, -1, -1))


def keeping_share(method: MethodOptions, tasks: Sequence[Similarities]) -> float | None:
    """The smallest share of the best probability with which at most `NOTICED` percent receive the newest set.

    None where the method's share is already large enough. The tasks' scores are logarithms of probabilities.
    """
    own = getattr(method, "share", None)
    limit = _distance(_limited(method, "share", None), tasks, math.inf if own is None else -math.log(own))
    if limit is None:
        return None
    whole = round(1 / STEP)
    steps = min(whole, math.floor(math.exp(-limit) / STEP) + 1)  # above the share at the limit
    return _first_that_keeps(lambda value: _limited(method, "share", value), tasks, range(steps, whole + 1))


def _distance(always: MethodOptions, tasks: Sequence[Similarities], own: float) -> float | None:
    """The distance behind the best set from which on the newest one has to be left out; None where `own` is less.

    Args:
        always: the method without gate or share.
        tasks: the earlier tasks' samples.
        own: the distance from which on the method leaves sets out.
    """
    limit = own
    for similar in tasks:
        # A set outside the k best is never inserted. Sort the distances of the others: a larger one inserts more.
        distances = similar.behind()[similar.inserted(always)].sort().values.tolist()
        allowed = math.floor(len(similar.scores) * NOTICED / 100)
        if len(distances) > allowed:
            limit = min(limit, distances[allowed])
    return limit if limit < own else None


def _first_that_keeps(
    limited: Callable[[float], MethodOptions], tasks: Sequence[Similarities], steps: Sequence[int]
) -> float:
    """The first of these multiples of `STEP` that keeps the newest set out, or the last of them.

    Scores are float32, so a value near the limit is verified with the selection itself.
    """
    for step in steps[:-1]:
        method = limited(step * STEP)
        if all(percent(similar.inserted(method)) <= NOTICED for similar in tasks):
            return round(step * STEP, 3)
    return round(steps[-1] * STEP, 3)


def percent(flags: Tensor) -> float:
    """The percentage of set flags [N]; 0 of none."""
    return 100.0 * float(flags.double().mean()) if len(flags) else 0.0


def first_of(similar: Similarities) -> dict[int, float]:
    """Percent of the samples for which each task ranks first, by its number; tasks that never do are left out."""
    counts = similar.scores.argmax(1).bincount(minlength=similar.scores.shape[1])
    total = max(len(similar.scores), 1)
    return {task: 100.0 * count / total for task, count in enumerate(counts.tolist()) if count}
