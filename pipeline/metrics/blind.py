"""A baseline that sees neither image nor question: the most frequent training answer, given to every test sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from pipeline.data.sample import Sample
from pipeline.metrics.scoring import Answered, score_task

MOST_READ = 10_000  # training samples read to find the most frequent answer; a large task is sampled evenly


def majority_score(
    training: Texts,
    test: Iterable[Sample],
    metric: str,
    scoring: str = "fixed",
    has_image: Sequence[bool] | None = None,
) -> float:
    """The score in percent of the most frequent training answer as the answer to every test sample (ties: the first).

    Args:
        training: training samples, read without images; of a large set MOST_READ, evenly spaced.
        test: test samples.
        metric: name of the task's metric.
        scoring: `data.scoring` of the recipe.
        has_image: which test samples have an image, where these were read without; None: the samples tell.
    """
    answer = _counts(training).most_common(1)[0][0]
    samples = list(test)
    pictured = [sample.image is not None for sample in samples] if has_image is None else has_image
    answered = [Answered(answer, item.answer, item.meta, has) for item, has in zip(samples, pictured, strict=True)]
    return score_task(metric, answered, scoring).percent


def recurring_share(training: Texts, test: Iterable[Sample]) -> float:
    """The share in percent of test samples whose answer at least two training samples have; see `majority_score`."""
    counts = _counts(training)
    recurs = [counts[sample.answer] > 1 for sample in test]
    return 100.0 * sum(recurs) / max(len(recurs), 1)


def _counts(training: Texts) -> Counter[str]:
    """How often each answer is given to the training samples that are read."""
    places = np.linspace(0, len(training) - 1, min(len(training), MOST_READ)).round().astype(int)
    return Counter(training.text(place).answer for place in places.tolist())


class Texts(Protocol):
    """A list of samples that are read without their images."""

    def __len__(self) -> int: ...

    def text(self, index: int, /) -> Sample: ...
