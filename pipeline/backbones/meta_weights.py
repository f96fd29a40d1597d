"""Builds modules on the meta device without those of torch's functions that are written in Python there.

transformers builds a model on the meta device and then reads its weights. Random numbers and ranges on that device are
decompositions which import torch's compiler and sympy: seconds, for numbers that no weight keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

IN_PLACE = (Tensor.normal_, Tensor.uniform_)
INITIALISERS = "torch.nn.init"  # module of functions that fill the tensor they are given first
RANDOM = (torch.randn, torch.rand)
RANGES = (torch.arange, torch.linspace)
# What the frequencies of rotary embeddings are computed with; the model computes them anew once it has its weights.
ARITHMETIC = {"div", "true_divide", "reciprocal", "pow", "mul", "outer", "neg"}
ARITHMETIC |= {f"__{name}__" for name in ("truediv", "rtruediv", "rdiv", "pow", "rpow", "mul", "rmul", "neg")}
# Tensors of a meta tensor's shape, on any device.
LIKE: Mapping[Any, Any] = {torch.empty_like: torch.empty, torch.zeros_like: torch.zeros}
MOST = 1 << 16  # numbers of a tensor that are computed with on the CPU


class PlainMeta(TorchFunctionMode):
    """While the block runs, meta tensors are not filled, and small ones get their shapes by the CPU's functions.

    Tensors of other devices are as ever.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in IN_PLACE or getattr(func, "__module__", None) == INITIALISERS:
            filled = args[0] if args else kwargs.get("tensor")
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        elif func in RANDOM and _on_meta(kwargs):
            kwargs.pop("generator", None)
            return torch.empty(*args, **kwargs)
        elif func in RANGES and _on_meta(kwargs):
            return _empty(func(*args, **{**kwargs, "device": "cpu"}))
        elif func in LIKE and _are_meta(args, None) and kwargs.keys() <= {"device", "dtype"}:
            (like,) = args
            return LIKE[func](like.shape, **{"device": like.device, "dtype": like.dtype, **kwargs})
        elif getattr(func, "__name__", "") in ARITHMETIC and not kwargs and _are_meta(args):
            return _empty(func(*[_zeros(each) if isinstance(each, Tensor) else each for each in args]))
        return func(*args, **kwargs)


def _on_meta(kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _are_meta(args: Sequence[Any], most: int | None = MOST) -> bool:
    tensors = [each for each in args if isinstance(each, Tensor)]
    return bool(tensors) and all(each.is_meta and (most is None or each.numel() <= most) for each in tensors)


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # `empty_like` is in Python there
