"""O-LoRA (arXiv 2310.14152): a new LoRA in every stage, in a subspace kept orthogonal to those of earlier ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.method import Choice
from pipeline.methods.base import Method
from pipeline.methods.lora import LoraOptions


class OLoraOptions(LoraOptions):
    """A LoRA per stage, and what keeps it apart from the earlier ones."""

    TRAINING_ONLY = frozenset({"penalty", "normalise", "forward"})

    penalty: float = Field(0.5, ge=0, description="weight of the sum of |A_t A_i^T| over layers, earlier i and entries")
    normalise: bool = Field(
        False, description="true: the sum divided by rank^2 and the number of earlier modules, which it grows with"
    )
    forward: Literal["all", "own"] = Field(
        "all",
        description="all: earlier modules act while one is trained (paper); own: they do not (MCITlib, Prism), "
        "although all of them act in answers",
    )


class OLora(Method):
    """All modules act in every answer, so each stage changes earlier answers and no earlier module."""

    Options = OLoraOptions
    part = "low_rank"

    @property
    def rule(self) -> Choice:
        return {"name": "all", "forward": self.options.forward}

    @property
    def terms(self) -> tuple[Choice, ...]:
        return ({"name": "orthogonal_subspaces", "weight": self.options.penalty},)
