"""A method: every prompt set is trained alone, and the sets that resemble a sample most are inserted together."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.method import Choice, RouterChoice
from pipeline.methods.base import Method, PromptOptions


class LoneOptions(PromptOptions):
    """One prompt set per stage, how its task is recognised, and how many are inserted."""

    k: int = Field(2, ge=1, description="sets inserted for one sample")
    router: RouterChoice = Field("mean", description="how the task of a sample is recognised")


class LonePrompts(Method):
    """No set sees another in training, so tasks may be learned in any order, or at the same time."""

    name = "lone_prompts"
    Options = LoneOptions

    @property
    def router(self) -> Choice:
        choice: Choice = self.options.router
        return choice

    @property
    def rule(self) -> Choice:
        return {"name": "soft", "k": self.options.k}
