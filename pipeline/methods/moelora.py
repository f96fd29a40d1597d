"""MoELoRA (CoIN, arXiv 2403.08350): experts in every layer that a token's own router mixes, trained on and on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.methods.base import Changes, Method
from pipeline.methods.lora import LoraOptions


class MoELoraOptions(LoraOptions):
    """Experts on linear layers of the decoder; `rank` is that of all of them together."""

    experts: int = Field(4, ge=1, description="E, experts per layer, each of rank / E, rounded up")
    mix: Literal["expert", "factors"] = Field(
        "expert",
        description="expert: sum_e g_e B_e A_e x (CoIN); factors: (sum_e g_e B_e)(sum_e g_e A_e) x, with cross terms "
        "(Prism)",
    )


class MoELora(Method):
    """Experts and routers are the same ones in every stage, so each stage changes what earlier ones learned."""

    Options = MoELoraOptions
    part = "experts"
    carries_prompt = True
    rule = "current"

    @property
    def changes_earlier(self) -> Changes:
        return "modules"
