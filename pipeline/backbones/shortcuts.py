"""Which exact shortcuts a loaded model takes, and why not the others: logged once per model, for a run's speed."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.backbones.gated import why_not_gated
from pipeline.backbones.last_layer import why_whole

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM

logger = logging.getLogger("pipeline.backbones.shortcuts")


@dataclass(frozen=True)
class Shortcut:
    """One way to compute the same with less; `obstacle` says why this model cannot, "" where it does."""

    name: str
    obstacle: str


def shortcuts_of(lmm: LMM) -> list[Shortcut]:
    """The shortcuts, with what is in the way of each for this model."""
    family = lmm.family
    layer: Any = lmm.decoder.layers[-1]  # type: ignore[index]
    return [
        Shortcut("last layer at the answers only", why_whole(layer.self_attn, family.lean_attentions)),
        Shortcut("gated MLPs keep two vectors per token", why_not_gated(layer.mlp, family.gated_mlps)),
        Shortcut("prefix cache for shared images", family.needs_one_pass()),
    ]


def log_shortcuts(lmm: LMM) -> None:
    """One line: the shortcuts that are taken, and the reason for each that is not."""
    found = shortcuts_of(lmm)
    taken = ", ".join(one.name for one in found if not one.obstacle) or "none"
    others = "".join(f"; not {one.name}: {one.obstacle}" for one in found if one.obstacle)
    logger.info("%s: shortcuts taken: %s%s", lmm.family.kind, taken, others)
