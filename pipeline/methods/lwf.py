"""Learning without forgetting (arXiv 1606.09282) on a LoRA that every stage trains on."""

from __future__ import annotations

from pydantic import Field

from pipeline.config.method import Choice
from pipeline.methods.lora import Lora, LoraOptions


class LwfOptions(LoraOptions):
    """A LoRA, and how closely it follows the one before."""

    TRAINING_ONLY = frozenset({"distillation", "temperature"})

    distillation: float = Field(1.0, ge=0, description="weight of the divergence from what the stage before says")
    temperature: float = Field(2.0, gt=0, description="divides both scores before the divergence is taken")


class Lwf(Lora):
    """As `lora`, with the answers' tokens scored as the stage before scores them; needs no earlier sample."""

    Options = LwfOptions

    @property
    def terms(self) -> tuple[Choice, ...]:
        return ({"name": "distilled", "weight": self.options.distillation, "temperature": self.options.temperature},)
