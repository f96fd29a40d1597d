"""DISCO (arXiv 2503.13575): a LoRA per task, weighted in every layer by the similarity of the question to tasks."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.low_rank import LowRankOptions
from pipeline.config.method import Choice, RoutedOptions, RouterChoice
from pipeline.methods.base import Method


class DiscoOptions(RoutedOptions, LowRankOptions):
    """A LoRA per task, and how it is weighted."""

    temperature: float = Field(0.05, gt=0, description="divides the scores in the softmax over all tasks")
    image_weight: float = Field(0.0, ge=0, le=1, description="share of the image in the similarity; published: none")
    router: RouterChoice = Field("two_means", description="how the task of a sample is recognised")


class Disco(Method):
    """Modules are trained alone and never change; a soft weight leaves every answer a little of every module."""

    Options = DiscoOptions
    part = "low_rank"

    @property
    def rule(self) -> Choice:
        return {"name": "weighted", "temperature": self.options.temperature}
