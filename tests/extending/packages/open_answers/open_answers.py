"""Two metrics: one that scores each answer, and one that needs the answers to the whole test set."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from pipeline.metrics.metric import Answered, Corpus, Meta, PerAnswer, TaskScore, percent


@PerAnswer
def first_word(prediction: str, answer: str, meta: Meta) -> float:
    """1 when the first words are equal without case."""
    return float(prediction.lower().split()[:1] == answer.lower().split()[:1])


@Corpus
def balanced(answered: Sequence[Answered]) -> TaskScore:
    """Accuracy in which every true answer counts alike, however often the test set has it; one part per answer."""
    points = [float(item.prediction.strip() == item.answer.strip()) for item in answered]
    by_answer: dict[str, list[float]] = defaultdict(list)
    for item, point in zip(answered, points, strict=True):
        by_answer[item.answer.strip()].append(point)
    parts = {answer: percent(found) for answer, found in by_answer.items()}
    return TaskScore(sum(parts.values()) / len(parts), parts, points)
