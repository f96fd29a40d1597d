"""Gated MLPs that store two activations per token for the backward pass instead of three."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from pipeline.backbones.recompute import divided
from pipeline.backbones.shortcuts import why_not_gated

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM


@contextlib.contextmanager
def gates_kept_once(lmm: LMM, checkpointing: str = "none", but: Collection[Any] = ()) -> Iterator[None]:
    """Recompute the SiLU of the decoder's gated MLPs in the backward pass instead of storing it.

    Autograd stores the gate, its activation and up; with frozen weights these are more than half of a layer's
    activations. The activation is recomputed from the gate by the same kernel, so loss and gradients are bit-identical.
    Layers that `checkpointing` recomputes as a whole are not changed, nor those in `but`.
    """
    _, layers = divided(lmm, checkpointing)
    mlps = [layer.mlp for layer in layers if layer not in but] if torch.is_grad_enabled() else []
    changed = [mlp for mlp in mlps if not why_not_gated(mlp, lmm.family.gated_mlps)]
    for mlp in changed:
        mlp.forward = _forward(mlp)
    try:
        yield
    finally:
        for mlp in changed:
            del mlp.forward


def _forward(mlp: Any) -> Callable[[Tensor], Tensor]:
    return lambda hidden: mlp.down_proj(_Gated.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))


class _Gated(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return of_gate, silu(gate).mul_(gradient)
