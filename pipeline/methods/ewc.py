"""Elastic weight consolidation (arXiv 1612.00796) on a LoRA that every stage trains on."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.method import Choice
from pipeline.methods.lora import Lora, LoraOptions


class EwcOptions(LoraOptions):
    """A LoRA, and how strongly it is held where it was."""

    TRAINING_ONLY = frozenset({"elasticity", "fisher_samples"})

    elasticity: float = Field(
        100.0, ge=0, description="weight of sum_i F_i (value - value_i)^2 / 2 over earlier tasks i, F_i their Fisher"
    )
    fisher_samples: int = Field(
        64, ge=1, description="training samples of a task whose squared gradients are its Fisher information"
    )


class Ewc(Lora):
    """As `lora`, with a penalty on changes of what mattered to earlier tasks."""

    Options = EwcOptions

    @property
    def terms(self) -> tuple[Choice, ...]:
        return ({"name": "elastic", "weight": self.options.elasticity, "samples": self.options.fisher_samples},)
