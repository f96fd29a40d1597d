"""Counts the floating-point operations of a block of code, for the costs of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

_ATEN = torch.ops.aten


def _products(left: Tensor, right: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Of `linear` and `matmul`: two for each number of the result and of the width that is summed over."""
    return 2 * out_val.numel() * left.shape[-1]


def _convolution(_: Tensor, weight: Tensor, *__: Any, out_val: Tensor, **___: Any) -> int:
    """Two for each number of the result and of the kernel that makes it."""
    return 2 * out_val.numel() * weight[0].numel()


# By kernel: a function of its arguments and result. The CPU's attention, which torch leaves out, is counted as the
# GPU's. In inference mode operations that are made of others arrive whole. They are not taken apart: torch's
# decompositions add in another order, and a counted step would have other last bits.
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN.linear: _products,
    _ATEN.matmul: _products,
    _ATEN.conv1d: _convolution,
    _ATEN.conv2d: _convolution,
    _ATEN.conv3d: _convolution,
    _ATEN.scaled_dot_product_attention: sdpa_flop,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


# Kernels of packages that may be missing, by name: the product with 4-bit weights of `pipeline.backbones.quantised`.
NAMED: dict[str, Callable[..., int]] = {"bitsandbytes::gemm_4bit": _products}


class OperationCount(TorchDispatchMode):
    """Adds up the operations of products, convolutions and attention, two per multiplication, while it is entered.

    torch's own counter raises where a kernel has shapes that its formula does not know. Here such a kernel is left out,
    because a count must not end a run; `whole` is then False.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.samples, self.whole = 0, 0, True

    @property
    def per_sample(self) -> float | None:
        """Operations per sample; None where nothing was counted."""
        return self.operations / self.samples if self.samples and self.operations else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):  # a kernel that is compiled, for which there is no formula
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        formula = FORMULAS.get(func._overloadpacket) or NAMED.get(func._schema.name)
        if formula is None:
            return result
        try:
            self.operations += int(formula(*args, **kwargs, out_val=result))
        except Exception:  # whatever a formula makes of shapes that it does not know
            self.whole = False
        return result


def counting(count: OperationCount | None) -> AbstractContextManager[Any]:
    """The block of a count, or one in which nothing is counted."""
    return contextlib.nullcontext() if count is None else count
