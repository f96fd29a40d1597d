"""What the implementations of attention take to say which tokens see which.

sdpa and eager take a mask with a row per position. FlashAttention takes none: it is causal, and told the padding of
sequences or the lengths of those that stand behind each other.
"""

from __future__ import annotations

import copy
import importlib.util
from functools import partial
from typing import Any

from torch import Tensor

from pipeline.config.models import ModelConfig
from pipeline.errors import UserError

MASKS = ("sdpa", "eager")  # implementations that take a mask with a row per position


def takes_lengths(implementation: str) -> bool:
    """Whether an implementation takes the lengths of sequences behind each other in one row, and no mask of rows.

    Those are FlashAttention's, from its package or a kernel of the Hub; transformers knows them by the same word.
    """
    return "flash" in implementation and not implementation.startswith("paged|")


def require_kernel(config: ModelConfig, here: bool = True) -> None:
    """Raise UserError where the attention of a recipe's model cannot compute in its precision, or is not installed.

    `here`: whether the model is to run in this environment.
    """
    name = config.attn_implementation
    if not takes_lengths(name):
        return
    if config.dtype == "float32":
        raise UserError(
            f"model.attn_implementation {name} does not compute in float32; set model.dtype to bfloat16, or "
            "attn_implementation to sdpa."
        )
    if here and name == "flash_attention_2" and not any(map(importlib.util.find_spec, ("flash_attn", "kernels"))):
        raise UserError(
            f"model.attn_implementation {name} needs the package flash-attn, and it is not installed; run `pip install "
            "flash-attn --no-build-isolation` where the GPU is, or set it to sdpa."
        )


def take_masks(attention: Any) -> None:
    """From now on compute by sdpa what this attention module is given with a mask of rows [B, 1, n, M].

    Without such a mask it computes as before. This stays, because a layer may be computed again in the backward pass.
    """
    before = attention.__dict__.get("forward")
    if isinstance(before, partial) and before.func is _by_mask:
        return
    masked = copy.copy(attention)  # the same weights, hooks and submodules, with a configuration of its own
    masked.config = copy.copy(attention.config)
    masked.config._attn_implementation = "sdpa"
    attention.forward = partial(_by_mask, attention, masked)


def _by_mask(attention: Any, masked: Any, *given: Any, attention_mask: Tensor | None = None, **named: Any) -> Any:
    rows = attention_mask is not None and attention_mask.dim() == 4
    used = masked if rows and takes_lengths(attention.config._attn_implementation) else attention
    return type(attention).forward(used, *given, attention_mask=attention_mask, **named)
