"""Metrics: the score of a test set from its answers, as the mean over the answers or as one score of them all.

A metric of another package is an instance of `PerAnswer`, `Corpus` or an own subclass of `Metric`, under a name of
`pipeline.config.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from pipeline.errors import UserError

Meta = dict[str, Any]
AnswerScore = Callable[[str, str, Meta], float]  # of (prediction, answer, meta), in [0, 1]


@dataclass(frozen=True)
class Answered:
    """A model's answer to a test sample, beside the true one."""

    prediction: str
    answer: str
    meta: Meta = field(default_factory=dict)
    has_image: bool = True


@dataclass(frozen=True)
class TaskScore:
    """The score of a test set in percent, the scores of its parts in percent, and one per sample in [0, 1]."""

    percent: float
    parts: dict[str, float]
    points: list[float]


class Metric:
    """Scores the answers to a test set; `needs` are the import names of the packages that it requires.

    `check`, `prepare` and `run` call `require` before they start.
    """

    needs: Sequence[str] = ()

    def require(self) -> None:
        """Raise UserError when a package of `needs` is not installed."""
        for package in self.needs:
            if find_spec(package) is None:
                raise UserError(f"The metric needs the package {package}, which is not installed; install it.")

    def score(self, answered: Sequence[Answered], scoring: str) -> TaskScore:
        """The score of a test set, which may be empty.

        `scoring` is the recipe's `data.scoring`: "fixed", or "compat" for the scores of the published scripts.
        """
        raise NotImplementedError


class PerAnswer(Metric):
    """The mean of the scores of single answers; `compat` scores one answer as the published scripts do, if different.

    A test set in which some samples have an image and others none has the parts `image` and `text` (ScienceQA's IMG
    accuracy, docs/design.md 6.1). Can be used as a decorator of the function that scores one answer.
    """

    def __init__(self, one: AnswerScore, compat: AnswerScore | None = None, needs: Sequence[str] = ()) -> None:
        self.one, self.compat, self.needs = one, compat or one, needs

    def __call__(self, prediction: str, answer: str, meta: Meta | None = None, scoring: str = "fixed") -> float:
        """The score of one answer, in [0, 1]; UserError where the function gives another number."""
        value = (self.compat if scoring == "compat" else self.one)(prediction, answer, meta or {})
        if not 0.0 <= value <= 1.0:  # NaN too
            raise UserError(
                f"The metric's function {getattr(self.one, '__name__', self.one)} scored an answer with {value!r}; "
                "expected a number from 0 to 1. Correct the function."
            )
        return float(value)

    def score(self, answered: Sequence[Answered], scoring: str) -> TaskScore:
        points = [self(item.prediction, item.answer, item.meta, scoring) for item in answered]
        split = {
            name: [value for value, item in zip(points, answered, strict=True) if item.has_image == with_image]
            for name, with_image in (("image", True), ("text", False))
        }
        parts = {name: percent(values) for name, values in split.items()} if all(split.values()) else {}
        return TaskScore(percent(points), parts, points)


class Corpus(Metric):
    """A score of all answers together; `whole` returns it with its parts and with a score per sample."""

    def __init__(self, whole: Callable[[Sequence[Answered]], TaskScore], needs: Sequence[str] = ()) -> None:
        self.whole, self.needs = whole, needs

    def score(self, answered: Sequence[Answered], scoring: str) -> TaskScore:
        return self.whole(answered) if answered else TaskScore(0.0, {}, [])


def percent(points: Sequence[float]) -> float:
    """The mean of scores in [0, 1], in percent; 0 where there are none."""
    return 100.0 * sum(points) / max(1, len(points))
