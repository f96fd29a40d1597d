"""Fetches and validates a run's frozen models before anything else."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from pipeline.backbones.clip import keys_source
from pipeline.backbones.lmm_processor import source_of
from pipeline.backbones.lmm_weights import require_fitting_weights
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.hub.snapshots import share
from pipeline.ranks.world import World, on_main

log = logging.getLogger("pipeline.planning.frozen_models")


def fetch_models(model: ModelConfig, keys: KeysConfig, world: World, each_round: Callable[[], object]) -> None:
    """Fetch model and CLIP as complete folders for all ranks; a collective that calls `each_round` while it waits.

    Raises UserError when one is unavailable or lacks weights of the model.
    """
    share(world, [source_of(model), keys_source(keys.location, keys.revision, keys.kind)], each_round)
    on_main(world, lambda: require_fitting_weights(model))
    note = emulated(model.dtype)
    if note and world.main:
        log.warning("model.dtype: %s", note)


def emulated(dtype: str) -> str:
    """A warning about a precision that the visible GPUs, or the CPU without any, only emulate; "" elsewhere."""
    if dtype != "bfloat16":
        return ""
    if not torch.cuda.is_available():
        # Matrix products convert every operand there: of 160 tokens through 135 million weights, 28 s against 1.5 s.
        if torch.backends.cpu.get_cpu_capability() != "AVX2":
            return ""
        return (
            "this machine's CPU has no instructions for bfloat16 and takes many times as long as for float32, "
            "which model.dtype=float32 chooses"
        )
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return ""
    return (
        f"{torch.cuda.get_device_name()} emulates bfloat16, which is slower than float32; native bfloat16 needs "
        "compute capability 8.0 or newer (A100, RTX 30)"
    )
