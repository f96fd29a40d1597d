"""Runs the decoder's last layer only at the positions whose output is needed; others need only keys and values."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.attentions import MASKS, take_masks, takes_lengths
from pipeline.backbones.sharded import COMPUTED, is_elsewhere


@contextlib.contextmanager
def last_layer_at(decoder: nn.Module, positions: Tensor | None, attentions: Collection[str]) -> Iterator[bool]:
    """Make the decoder return hidden states [B, A, D] at `positions` [B, A] of its input only.

    The layer's own code runs on fewer rows, with the keys and values of all positions. Yields whether that is possible;
    otherwise the decoder returns all hidden states. `attentions` are the attention classes for which it is exact
    (`LMMFamily.lean_attentions`). Where the other layers use FlashAttention, which has no mask of rows, this one uses
    sdpa.
    """
    layer: Any = decoder.layers[-1]  # type: ignore[index]
    attention = layer.self_attn
    if positions is None or why_whole(attention, attentions):
        yield False
        return
    if takes_lengths(attention.config._attn_implementation):
        take_masks(attention)
    # What a divided layer computes lies behind its forward, which sends the output to the other ranks.
    slot = COMPUTED if hasattr(layer, COMPUTED) else "forward"
    before, plain, elsewhere = layer.__dict__.get(slot), getattr(layer, slot), is_elsewhere(layer)

    def there(
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, ...],
        past_key_values: Any = None,
        cu_seq_lens_k: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        if elsewhere:
            return rows_at(plain(hidden, past_key_values=past_key_values), positions)
        keys, values = _keys_and_values(attention, layer.input_layernorm(hidden), position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, attention.layer_idx)
        return plain(
            rows_at(hidden, positions),
            attention_mask=_mask_at(attention_mask, positions, hidden.shape[1], keys.shape[2], cu_seq_lens_k),
            position_embeddings=tuple(rows_at(part, positions) for part in position_embeddings),
            past_key_values=_Given(keys, values),
            **inputs | {"position_ids": None},
        )

    setattr(layer, slot, there)
    try:
        yield True
    finally:
        if before is None:
            delattr(layer, slot)
        else:
            setattr(layer, slot, before)


def why_whole(attention: Any, attentions: Collection[str]) -> str:
    """Why the last layer has to be computed at all positions; "" where it need not be."""
    name, implementation = type(attention).__name__, attention.config._attn_implementation
    if name not in attentions:
        return f"{name} is not known to make keys and values like {', '.join(attentions) or 'any other class'}"
    if implementation in MASKS:
        return ""
    if not takes_lengths(implementation):
        return f"attention '{implementation}' takes no mask with a row per position, only sdpa and eager do"
    if getattr(attention.config, "sliding_window", None):
        return f"attention '{implementation}' knows of sliding windows without a mask"
    return ""


def rows_at(values: Tensor, positions: Tensor) -> Tensor:
    """The rows [B, A, D] of `values` [B or 1, N, D] at `positions` [B, A]."""
    samples = torch.arange(len(positions), device=values.device) if len(values) > 1 else positions.new_zeros(1)
    return values[samples[:, None], positions]


def _keys_and_values(attention: nn.Module, hidden: Tensor, angles: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Rotated keys, and values [B, heads, N, d], of normalised states [B, N, D], as the attention computes them."""
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    keys = attention.k_proj(hidden).view(shape).transpose(1, 2)  # type: ignore[operator]
    values = attention.v_proj(hidden).view(shape).transpose(1, 2)  # type: ignore[operator]
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb  # the architecture's own
    return rotate(keys[:, :0], keys, *angles)[1], values


def _mask_at(
    mask: Tensor | None, positions: Tensor, queries: int, keys: int, boundaries: Tensor | None = None
) -> Tensor:
    """The rows [B, 1, A, M] of an attention mask [B or 1, 1, N, M].

    A mask that is None is a causal one without padding, one of [B, M] is that padding. With `boundaries` [S + 1] the
    columns are S sequences behind each other.
    """
    if mask is not None and mask.dim() == 4:
        mask = mask.expand(len(positions), -1, -1, -1)
        return mask.gather(2, positions[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    columns = torch.arange(keys, device=positions.device)
    visible = columns <= positions[..., None] + (keys - queries)
    if mask is not None:
        visible = visible & mask[:, None].bool()
    if boundaries is not None:
        own = torch.searchsorted(boundaries, positions.to(boundaries.dtype), right=True) - 1
        visible = visible & (columns >= boundaries[own][..., None])
    return visible[:, None]


class _Given:
    """A cache whose `update` returns precomputed keys and values."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.pair = keys, values

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values [B, heads, M, d] of all positions; the arguments are ignored."""
        return self.pair
