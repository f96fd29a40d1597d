"""CoRe-MoE (arXiv 2608.27867): after the first task a stage trains only a small core between frozen bases."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.low_rank import LowRankOptions
from pipeline.config.method import Choice, RoutedOptions, RouterChoice
from pipeline.methods.base import Method


class CoreMoEOptions(RoutedOptions, LowRankOptions):
    """A core [rank, rank] per task and layer, and how cores are weighted."""

    temperature: float = Field(0.05, gt=0, description="divides the scores in the softmax over all tasks")
    image_weight: float = Field(0.5, ge=0, le=1, description="share of the image in the similarity")
    router: RouterChoice = Field("two_means", description="how the task of a sample is recognised")


class CoreMoE(Method):
    """The bases are the singular vectors of the first task's LoRA; no stage changes bases or earlier cores."""

    Options = CoreMoEOptions
    part = "core"

    @property
    def rule(self) -> Choice:
        return {"name": "weighted", "temperature": self.options.temperature}
