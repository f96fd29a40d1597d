"""What a task scores without looking: a model that has learned to see is clearly above it."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import numpy as np

from pipeline.data.sample import Sample
from pipeline.metrics.scoring import Answered, score_task

MOST_READ = 10_000  # training samples read to find the most frequent answer; a large task is sampled evenly


class Samples(Protocol):
    """A list of samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def majority_score(training: Samples, test: Samples, metric: str, scoring: str = "fixed") -> float:
    """Percent that the most frequent training answer scores as the answer to every test sample (ties: the first)."""
    places = np.linspace(0, len(training) - 1, min(len(training), MOST_READ)).round().astype(int)
    counts = Counter(training[place].answer for place in places.tolist())
    answer = counts.most_common(1)[0][0]
    samples = (test[place] for place in range(len(test)))
    answered = [Answered(answer, sample.answer, sample.meta, sample.image is not None) for sample in samples]
    return score_task(metric, answered, scoring).percent
