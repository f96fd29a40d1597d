"""Which tasks routing takes for which: shares of each task's test samples by the task whose set ranks first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.prompts.routers import States
from pipeline.prompts.routing import Routing
from pipeline.sequence.test_set import TestSet

ROUTED = "accuracy"  # the view of a router that is the router itself
MOST_CONFUSED = 10  # pairs that matrix.json lists


@dataclass(frozen=True)
class RoutingShares:
    """Shares of the test samples of T tasks in percent, by the task that scores highest."""

    # [T] of a task's own samples, by the router's views: itself and, where it has them, one kind of key alone.
    views: Mapping[str, list[float]]
    # Own task -> task that scores highest -> share. Pairs that do not occur are left out: of a thousand tasks there
    # are a million.
    confusion: Mapping[str, Mapping[str, float]]

    def most_confused(self, most: int = MOST_CONFUSED) -> list[dict[str, Any]]:
        """The pairs of tasks with the largest shares of misrouted samples, the largest first; ties in task order."""
        pairs: list[dict[str, Any]] = [
            {"task": task, "taken_by": first, "percent": share}
            for task, shares in self.confusion.items()
            for first, share in shares.items()
            if first != task
        ]
        return sorted(pairs, key=lambda pair: -pair["percent"])[:most]

    def content(self) -> dict[str, Any]:
        """`routing` of matrix.json."""
        return {**self.views, "confusion": self.confusion, "confused": self.most_confused()}


def routing_shares(tests: Sequence[TestSet], states: States, routing: Routing) -> RoutingShares:
    """Where a router sends the samples of T test sets; state i must be that of task i."""
    reduced = {} if routing.router is None else routing.router.views()
    scores = {name: view.scores for name, view in reduced.items()} | {ROUTED: routing.scores}
    shares = {
        name: [_shares(score(test.data.keys, states), len(states)) for test in tests] for name, score in scores.items()
    }
    confusion = {
        test.name: {other.name: share for other, share in zip(tests, row, strict=True) if share}
        for test, row in zip(tests, shares[ROUTED], strict=True)
    }
    views = {view: [row[number] for number, row in enumerate(found)] for view, found in shares.items()}
    return RoutingShares(views, confusion)


def _shares(scores: Tensor, tasks: int) -> list[float]:
    """Percent of the samples [N, T] for which each of the T tasks scores highest."""
    counts = torch.bincount(scores.argmax(1), minlength=tasks).tolist()
    return [100.0 * (count / max(len(scores), 1)) for count in counts]
