"""What a run costs: parameters that are trained and kept, operations per sample, seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from pipeline.methods import Method
from pipeline.prompts.pool import PromptPool

ANSWERING = "operations_by_task"  # in run.json: of answers, by task; what an earlier call counted is kept


@dataclass
class Costs:
    """Collected while a run goes through its stages; a restart begins with what run.json has.

    Operations of training are those of the first micro-batch of each stage, those of answering the first batch of each
    task's test set, whose questions are the longest. Both count padding, and are means over stages and tasks. After a
    restart in the middle of a stage or a test set the first batch is the first one that was left.
    """

    before: Mapping[str, Any] = field(default_factory=dict)  # `costs` of run.json
    _trained: list[int] = field(default_factory=list)
    _training: list[float] = field(default_factory=list)
    _seconds: list[float] = field(default_factory=list)
    _answering: dict[str, float] = field(default_factory=dict)

    def stage(self, meta: Mapping[str, Any]) -> None:
        """Add a finished stage, by its meta.json; one of an earlier version has no counts."""
        for name, found in (
            ("trained_parameters", self._trained),
            ("operations_per_sample", self._training),
            ("seconds", self._seconds),
        ):
            if meta.get(name) is not None:
                found.append(meta[name])

    def answered(self, task: str, per_sample: float | None) -> None:
        """Add the operations of an answer to a question of a task, where they were counted."""
        if per_sample is not None:
            self._answering[task] = per_sample

    def by_task(self) -> dict[str, float]:
        """Operations of an answer by task."""
        before: dict[str, float] = {}
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # a damaged entry: only this call's
            before = {task: float(value) for task, value in (self.before.get(ANSWERING) or {}).items()}
        return {**before, **self._answering}

    def content(self, pool: PromptPool, method: Method, tasks: int) -> dict[str, float | None]:
        """The costs after the stages so far, of which `tasks` tasks have been learned; None where not counted.

        `trained_per_stage` is the largest over the stages, with everything that an optimizer updates. `stored_per_task`
        is what answering needs of the pool, divided by the tasks.
        """
        answering = self.by_task()
        return {
            "trained_per_stage": max(self._trained) if self._trained else (0 if method.part is None else None),
            "stored_per_task": stored(pool, method) / tasks if tasks else 0.0,
            "operations_training": mean(self._training) if self._training else None,
            "operations_answering": mean(answering.values()) if answering else None,
            "seconds_training": round(sum(self._seconds), 1),
        }


def stored(pool: PromptPool, method: Method) -> int:
    """Parameters that answering needs: modules that can still be chosen, what they share, and the router's states.

    Where each stage goes on from the module of the one before, the newest alone answers.
    """
    if not len(pool):
        return 0
    modules = sum(value[-1:].numel() if method.carries_prompt else value.numel() for value in pool.tensors.values())
    states = sum(value.numel() for state in pool.states for value in state.values())
    return modules + sum(value.numel() for value in pool.shared.values()) + states
