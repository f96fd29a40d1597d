"""The decoder's last layer at some positions only: of all others nothing but their keys and values is ever used."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM

# Attention that makes keys and values in the same three steps: project, divide into heads, rotate the keys.
KNOWN = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen2_5_VLAttention")


@contextlib.contextmanager
def last_layer_at(lmm: LMM, positions: Tensor | None) -> Iterator[bool]:
    """Let the decoder inside return hidden states [B, A, D] at these `positions` [B, A] of its input.

    Yields whether it does: an architecture or attention that is not known to allow it goes on returning all of them.
    What the layer computes is its own code, on fewer rows; keys and values are those of all positions.
    """
    layer: Any = lmm.decoder.layers[-1]  # type: ignore[index]
    attention = layer.self_attn
    if (
        positions is None
        or type(attention).__name__ not in KNOWN
        or attention.config._attn_implementation not in ("sdpa", "eager")
    ):
        yield False
        return
    before, plain = layer.__dict__.get("forward"), layer.forward

    def there(
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, ...],
        past_key_values: Any = None,
        **inputs: Any,
    ) -> Tensor:
        keys, values = _keys_and_values(attention, layer.input_layernorm(hidden), position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        return plain(
            rows_at(hidden, positions),
            attention_mask=_mask_at(attention_mask, positions, hidden.shape[1], keys.shape[2]),
            position_embeddings=tuple(rows_at(part, positions) for part in position_embeddings),
            past_key_values=_Given(keys, values),
            **inputs | {"position_ids": None},
        )

    layer.forward = there
    try:
        yield True
    finally:
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def rows_at(values: Tensor, positions: Tensor) -> Tensor:
    """The rows [B, A, D] of `values` [B or 1, N, D] at `positions` [B, A]."""
    samples = torch.arange(len(positions), device=values.device) if len(values) > 1 else positions.new_zeros(1)
    return values[samples[:, None], positions]


def _keys_and_values(attention: nn.Module, hidden: Tensor, angles: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Keys, rotated, and values [B, heads, N, d] as the attention itself makes them of normed states [B, N, D]."""
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(hidden).view(shape).transpose(1, 2)  # type: ignore[operator]
    values = attention.v_proj(hidden).view(shape).transpose(1, 2)  # type: ignore[operator]
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # the architecture's own
    return rotate(keys[:, :0], keys, *angles)[1], values


def _mask_at(mask: Tensor | None, positions: Tensor, queries: int, keys: int) -> Tensor:
    """The rows [B, 1, A, M] of an attention mask [B or 1, 1, N, M]; None stands for a causal one without padding."""
    if mask is None:
        columns = torch.arange(keys, device=positions.device)
        return (columns <= positions[..., None] + (keys - queries))[:, None]
    mask = mask.expand(len(positions), -1, -1, -1)
    return mask.gather(2, positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


class _Given:
    """A cache that answers with keys and values that are there already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.pair = keys, values

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, M, d] of all positions, whatever those of the call are."""
        return self.pair
