"""What a run does about its frozen models before anything else: they are fetched, whole, and said to fit the GPUs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from pipeline.backbones.clip import keys_source
from pipeline.backbones.lmm_processor import source_of
from pipeline.backbones.lmm_weights import require_fitting_weights
from pipeline.config.recipe import Recipe
from pipeline.hub.snapshots import share
from pipeline.ranks.world import World, on_main

log = logging.getLogger("pipeline.planning.frozen_models")


def fetch_models(recipe: Recipe, world: World, each_round: Callable[[], object]) -> None:
    """Make model and CLIP whole folders that all ranks load from; all ranks call it, and `each_round` while it lasts.

    Raises UserError when one cannot be had, or lacks weights of the model.
    """
    share(world, [source_of(recipe.model), keys_source(recipe.keys.location, recipe.keys.revision)], each_round)
    on_main(world, lambda: require_fitting_weights(recipe.model))
    note = emulated(recipe.model.dtype)
    if note and world.main:
        log.warning("model.dtype: %s", note)


def emulated(dtype: str) -> str:
    """What to say about a precision that the visible GPUs only emulate; "" where there is nothing to say."""
    if dtype != "bfloat16" or not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        return ""
    return (
        f"{torch.cuda.get_device_name()} emulates bfloat16, which is slower there than float32; it has to be of "
        "compute capability 8.0 or newer (A100, RTX 30) to compute in it"
    )
