"""The accuracy matrix of a run, which is the content of matrix.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.metrics.continual import retention_per_task, routing_costs, routing_loss_per_task, summarise
from pipeline.sequence.confusion import RoutingShares

Row = list[float | None]


@dataclass
class AccuracyMatrix:
    """The scores of T tasks in percent, row by row as the stages are evaluated."""

    tasks: Sequence[str]
    zero_shot: list[float] | None = None  # [T]
    rows: list[Row] = field(default_factory=list)  # [T] each, None for tasks that are not learned yet
    ahead: dict[int, float | None] = field(default_factory=dict)  # by task: its score just before its own stage
    told: dict[int, Row] = field(default_factory=dict)  # by row, 0-based: the scores [T] with the task told

    def add(self, row: Row, seen: int) -> None:
        """Add the row after the stage with which `seen` tasks are learned.

        Joint training has one stage for all tasks, so only the last row is defined; rows above are filled with None.
        """
        self.rows += [[None] * len(row) for _ in range(seen - 1 - len(self.rows))]
        self.rows.append(row)

    def content(
        self,
        with_ahead: bool,
        majority: list[float] | None = None,
        routing: RoutingShares | None = None,
        **further: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The content of matrix.json.

        Args:
            with_ahead: whether scores ahead of the tasks' stages are part of it.
            majority: scores [T] of each task's most frequent training answer.
            routing: shares of the test samples that the router sends to their own task and to others.
            further: what else there is, by name: `format_free`, `costs`.
        """
        ahead = [self.ahead.get(task) for task in range(len(self.tasks))] if with_ahead else None
        zero_shot = self.zero_shot
        metrics: dict[str, Any] = {"zero_shot": sum(zero_shot) / len(zero_shot) if zero_shot else None}
        if self.rows:
            metrics = {
                **summarise(self.rows, zero_shot, ahead),
                "retention_per_task": retention_per_task(self.rows),
                **self._costs(),
            }
        content = {"tasks": list(self.tasks), "zero_shot": zero_shot, "accuracy": self.rows, "metrics": metrics}
        told = [self.told.get(number) for number in range(len(self.rows))] if self.told else None
        given = {"majority": majority, "ahead": ahead, "told": told, "routing": routing and routing.content()}
        return {**content, **{name: value for name, value in given.items() if value}, **further}

    def _costs(self) -> dict[str, Any]:
        """What routing costs the scores of the last row; nothing where they were not measured with the task told."""
        last = len(self.rows) - 1
        if last not in self.told:
            return {}
        told, routed = self.told[last][: last + 1], self.rows[last][: last + 1]
        rest: Row = [None] * (len(self.tasks) - last - 1)
        return {**routing_costs(told, routed), "routing_loss_per_task": [*routing_loss_per_task(told, routed), *rest]}
