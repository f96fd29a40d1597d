"""The accuracy matrix of a run, which is the content of matrix.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.metrics.continual import retention_per_task, summarise
from pipeline.prompts.routers import Router, States
from pipeline.sequence.test_set import TestSet

Row = list[float | None]


def routing_accuracy(tests: Sequence[TestSet], states: States, router: Router) -> dict[str, list[float]]:
    """Percent of each task's test samples for which the task itself scores highest, by each of the router's `views`.

    The views are the router itself and, where it has them, versions that use one kind of key alone. State i must be
    that of task i.
    """
    return {
        name: [
            100.0 * float((view.scores(test.data.keys, states).argmax(1) == number).double().mean())
            for number, test in enumerate(tests)
        ]
        for name, view in router.views().items()
    }


@dataclass
class AccuracyMatrix:
    """The scores of T tasks in percent, row by row as the stages are evaluated."""

    tasks: Sequence[str]
    zero_shot: list[float] | None = None  # [T]
    rows: list[Row] = field(default_factory=list)  # [T] each, None for tasks that are not learned yet
    ahead: dict[int, float | None] = field(default_factory=dict)  # by task: its score just before its own stage

    def add(self, row: Row, seen: int) -> None:
        """Add the row after the stage with which `seen` tasks are learned.

        Joint training has one stage for all tasks, so only the last row is defined; rows above are filled with None.
        """
        self.rows += [[None] * len(row) for _ in range(seen - 1 - len(self.rows))]
        self.rows.append(row)

    def content(
        self, with_ahead: bool, majority: list[float] | None = None, routing: dict[str, list[float]] | None = None
    ) -> dict[str, Any]:
        """The content of matrix.json.

        Args:
            with_ahead: whether scores ahead of the tasks' stages are part of it.
            majority: scores [T] of each task's most frequent training answer.
            routing: shares [T] of samples routed to their own task, by the keys used.
        """
        ahead = [self.ahead.get(task) for task in range(len(self.tasks))] if with_ahead else None
        zero_shot = self.zero_shot
        metrics: dict[str, Any] = {"zero_shot": sum(zero_shot) / len(zero_shot) if zero_shot else None}
        if self.rows:
            metrics = {
                **summarise(self.rows, zero_shot, ahead),
                "retention_per_task": retention_per_task(self.rows),
            }
        content = {"tasks": list(self.tasks), "zero_shot": zero_shot, "accuracy": self.rows, "metrics": metrics}
        given = {"majority": majority, "ahead": ahead, "routing": routing}
        return {**content, **{name: value for name, value in given.items() if value}}
