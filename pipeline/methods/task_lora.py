"""One low-rank update (LoRA) per task, trained alone and found again by a router."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.method import Choice, MethodOptions, RouterChoice, RuleChoice
from pipeline.methods.base import Method


class TaskLoraOptions(MethodOptions):
    """One LoRA per task on linear layers of the decoder."""

    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        min_length=1,
        description="ends of the names of the decoder's linear layers that get an update",
    )
    rank: int = Field(8, ge=1, description="rank of each update")
    alpha: float = Field(16.0, gt=0, description="an update counts alpha / rank times")
    router: RouterChoice = Field("mean", description="how the task of a sample is recognised")
    rule: RuleChoice = Field(
        "hard", description="hard: the update of the most similar task; soft: several, weighted; or another rule"
    )


class TaskLora(Method):
    """The control that every routed method is compared with: nothing that a task has learned is touched by another.

    The updates of a batch's samples may differ; each row is computed with its own.
    """

    Options = TaskLoraOptions
    part = "low_rank"

    @property
    def router(self) -> Choice:
        choice: Choice = self.options.router
        return choice

    @property
    def rule(self) -> Choice:
        choice: Choice = self.options.rule
        return choice
