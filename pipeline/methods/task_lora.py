"""One low-rank update (LoRA) per task, trained alone and found again by a router."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from pipeline.config.low_rank import LowRankOptions
from pipeline.config.method import RoutedOptions, RouterChoice, RuleChoice
from pipeline.methods.base import Method


class TaskLoraOptions(RoutedOptions, LowRankOptions):
    """One LoRA per task on linear layers of the decoder."""

    FORMERLY: ClassVar[dict[str, Any]] = {"router": "mean"}

    router: RouterChoice = Field(
        "random_ridge",
        description="how the task of a sample is recognised. random_ridge, ridge: by a regression on a sample of the "
        "tasks' keys; mean, centres; or another router in closed form",
    )
    rule: RuleChoice = Field(
        "hard", description="hard: the update of the most similar task; soft: several, weighted; or another rule"
    )


class TaskLora(Method):
    """The control that every routed method is compared with: nothing that a task has learned is touched by another.

    The updates of a batch's samples may differ; each row is computed with its own.
    """

    Options = TaskLoraOptions
    part = "low_rank"
