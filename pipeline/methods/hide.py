"""HiDe-LLaVA (arXiv 2503.12941): a LoRA per task, fused in the lower layers and routed in the last ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.low_rank import LowRankOptions
from pipeline.config.method import Choice, RoutedOptions, RouterChoice
from pipeline.methods.base import Changes, Method


class HiDeOptions(RoutedOptions, LowRankOptions):
    """A LoRA per task, and how they answer together."""

    fuse: Literal["product", "sum"] = Field(
        "product",
        description="below the routed layers. product: (sum_i B_i)(sum_i A_i) x, with cross terms (paper); sum: "
        "sum_i B_i A_i x (Prism)",
    )
    routed_layers: int = Field(1, ge=0, description="the last so many layers are routed")
    route: Literal["soft", "hard"] = Field(
        "soft", description="soft: softmax of the scores (paper); hard: the best alone"
    )
    temperature: float = Field(0.1, gt=0, description="divides the scores in the softmax")
    image_weight: float = Field(0.5, ge=0, le=1, description="share of the image in the similarity")
    router: RouterChoice = Field("two_means", description="how the task of a sample is recognised")


class HiDe(Method):
    """Each module is trained alone; in the fused layers all act in every answer."""

    Options = HiDeOptions
    part = "fused_low_rank"

    @property
    def rule(self) -> Choice:
        return {"name": "weighted", "route": self.options.route, "temperature": self.options.temperature}

    @property
    def changes_earlier(self) -> Changes:
        return "answers"
