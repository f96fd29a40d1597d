"""Activation checkpointing: decoder layers that store only their input and are recomputed in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM

# Every n-th layer is recomputed; 0: none. `auto` is resolved per run by `pipeline.planning.auto`; where it is
# unresolved, as in a memory plan without GPUs, no layer is recomputed.
SHARES = {"auto": 0, "none": 0, "selective": 2, "full": 1}


def recomputed_layers(policy: str, layers: int) -> int:
    """Number of decoder layers that a policy recomputes."""
    return len(_recomputed(policy, layers))


def _recomputed(policy: str, layers: int) -> range:
    return range(0, layers, SHARES[policy]) if SHARES[policy] else range(0)


def divided(lmm: LMM, policy: str) -> tuple[list[Any], list[Any]]:
    """The decoder layers that a policy recomputes, and those whose activations are stored."""
    layers = list(lmm.decoder.layers)  # type: ignore[arg-type]
    numbers = _recomputed(policy, len(layers))
    return [layers[number] for number in numbers], [layer for n, layer in enumerate(layers) if n not in numbers]


@contextlib.contextmanager
def recomputing(
    lmm: LMM,
    policy: str,
    whole: bool = False,
    again_in: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[None]:
    """Recompute decoder layers that run inside the block in the backward pass.

    Args:
        lmm: the frozen model.
        policy: none; selective: every second layer; full: all layers.
        whole: recompute each layer to its end, as torch's reentrant checkpointing does; otherwise recomputation stops
            at the last activation that is needed.
        again_in: makes the context of a recomputation, for hooks of the forward pass, which are removed by then; not
            used with `whole`.
    """
    if policy == "none" or not torch.is_grad_enabled():
        yield
        return

    def again(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if whole:
            return lambda hidden, **inputs: checkpoint(partial(plain, **inputs), hidden, use_reentrant=True)

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return contextlib.nullcontext(), again_in()

        return lambda hidden, **inputs: checkpoint(
            partial(plain, **inputs), hidden, use_reentrant=False, context_fn=contexts
        )

    layers, _ = divided(lmm, policy)
    for layer in layers:
        layer.forward = again(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
