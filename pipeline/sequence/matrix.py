"""The accuracy matrix of a run: what matrix.json holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipeline.prompts.pool import PromptPool
from pipeline.sequence.evaluate import Test, task_similarity


def routing_accuracy(tests: Sequence[Test], pool: PromptPool, image_weight: float) -> dict[str, list[float]]:
    """Share (percent) of each task's test samples whose most similar set is the task's own: both keys, and either
    alone.

    Samples without an image are routed by their text whatever the weight. Set i must be that of task i.
    """
    result: dict[str, list[float]] = {}
    for name, weight in (("accuracy", image_weight), ("image_only", 1.0), ("text_only", 0.0)):
        result[name] = [
            100.0 * float((task_similarity(test, pool, weight).argmax(1) == number).double().mean())
            for number, test in enumerate(tests)
        ]
    return result


def matrix(
    tasks: Sequence[str],
    zero_shot: list[float] | None,
    accuracy: list[list[float | None]],
    routing: Any,
    ahead: list[float | None] | None = None,
    majority: list[float] | None = None,
) -> dict[str, Any]:
    """The content of matrix.json.

    `ahead` [T] are the scores of tasks just before their own stage, where measured; `majority` [T] those of each
    task's most frequent training answer.
    """
    from pipeline.metrics.continual import retention_per_task, summarise

    metrics: dict[str, Any] = {"zero_shot": _mean(zero_shot)}
    if accuracy:
        metrics = {**summarise(accuracy, zero_shot, ahead), "retention_per_task": retention_per_task(accuracy)}
    content: dict[str, Any] = {"tasks": list(tasks), "zero_shot": zero_shot, "accuracy": accuracy, "metrics": metrics}
    content |= {"majority": majority} if majority else {}
    content |= {"ahead": ahead} if ahead else {}
    return {**content, "routing": routing} if routing else content


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
