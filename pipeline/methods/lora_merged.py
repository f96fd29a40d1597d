"""A new LoRA in every stage, on the frozen model with all earlier ones merged in."""

from __future__ import annotations

from pipeline.methods.base import Method
from pipeline.methods.lora import LoraOptions


class LoraMerged(Method):
    """What a stage has learned stays in the model for all that follow, and no stage changes it.

    The sum of the frozen weight and the earlier updates is computed, not written into the weight: earlier modules stay
    bit-identical and can be taken out. Unlike with `lora`, every stage has a rank of its own.
    """

    Options = LoraOptions
    part = "low_rank"
    rule = "all"
