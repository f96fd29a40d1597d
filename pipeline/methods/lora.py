"""One low-rank update (LoRA) that every stage trains on: what is forgotten without any counter-measure."""

from __future__ import annotations

from pipeline.config.low_rank import LowRankOptions
from pipeline.config.method import MethodOptions
from pipeline.methods.base import Changes, Method


class LoraOptions(MethodOptions, LowRankOptions):
    """A LoRA on linear layers of the decoder."""


class Lora(Method):
    """Each stage goes on from the values of the one before; the newest answer every task."""

    Options = LoraOptions
    part = "low_rank"
    carries_prompt = True
    rule = "current"

    @property
    def changes_earlier(self) -> Changes:
        return "modules"
