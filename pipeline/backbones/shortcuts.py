"""Exact computational shortcuts of a loaded model: which apply, and why the others do not. Logged once per load."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.backbones.families.base import LMMFamily
from pipeline.backbones.last_layer import why_whole

logger = logging.getLogger("pipeline.backbones.shortcuts")
SILU = ("SiLU", "SiLUActivation")


@dataclass(frozen=True)
class Shortcut:
    """A cheaper way to the same result; `obstacle` is the reason why it does not apply, "" where it does."""

    name: str
    obstacle: str


def shortcuts_of(family: LMMFamily, decoder: nn.Module) -> list[Shortcut]:
    """All shortcuts, each with its obstacle for a model of this family with this decoder."""
    layer: Any = decoder.layers[-1]  # type: ignore[index]
    return [
        Shortcut("last layer at the answers only", why_whole(layer.self_attn, family.lean_attentions)),
        Shortcut("gated MLPs keep two vectors per token", why_not_gated(layer.mlp, family.gated_mlps)),
        Shortcut("prefix cache for shared images", family.needs_one_pass()),
    ]


def log_shortcuts(family: LMMFamily, decoder: nn.Module) -> None:
    """Log in one line which shortcuts apply, and the reason for each that does not."""
    found = shortcuts_of(family, decoder)
    taken = ", ".join(one.name for one in found if not one.obstacle) or "none"
    others = "".join(f"; not {one.name}: {one.obstacle}" for one in found if one.obstacle)
    logger.info("%s: shortcuts taken: %s%s", family.kind, taken, others)


def why_not_gated(mlp: Any, classes: Collection[str]) -> str:
    """Why the activation of a decoder layer's MLP cannot be recomputed, given the gated classes; "" where it can."""
    name, activation = type(mlp).__name__, type(getattr(mlp, "act_fn", None)).__name__
    if name not in classes:
        return f"{name} is not known to be down(act(gate(x)) * up(x))"
    if activation not in SILU:
        return f"its activation is {activation}, not SiLU"
    return ""
