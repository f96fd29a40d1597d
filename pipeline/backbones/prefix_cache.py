"""Prefix cache: keys and values of a prefix, computed once for all sequences that share it.

A decoder is causal, so the keys and values of a prefix do not depend on what follows. They are computed without
gradients, once per prefix (for example an image with several questions about it), and passed to the decoder with the
rest of each sequence (docs/design.md 7.7). All tensors are padded on the right; a mask with gaps and explicit positions
make the two passes equal to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM


@dataclass(frozen=True)
class PrefixCache:
    """Keys and values [U, heads, P, d] of U prefixes in every layer of the decoder."""

    layers: Sequence[tuple[Tensor, Tensor]]
    attention: Tensor  # [U, P]
    next_position: Tensor  # [U] position of the token after each prefix


class _PrefixLayer(CacheLayerMixin):
    """One layer's keys and values of the prefixes, expanded to the sequences that share them.

    They are expanded when the layer reads them, so the expanded copy of only one layer exists at a time. Keys and
    values of the second pass are not stored in the cache, because they carry gradients.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, groups: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values, self.groups = keys, values, groups
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the constructor was given keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, heads, P + S, d]: those of the prefixes, then those of this pass."""
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        if self.groups is not None:
            keys, values = keys[self.groups], values[self.groups]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys, and the offset of the first."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Number of tokens of the prefix, padding included."""
        assert self.keys is not None
        return self.keys.shape[-2]

    def get_max_length(self) -> int:
        """No limit."""
        return -1


@torch.no_grad()
def compute_prefix(
    lmm: LMM, embeddings: Tensor, attention: Tensor, image_mask: Tensor, images: dict[str, Tensor]
) -> PrefixCache:
    """Run the decoder over U prefixes.

    Args:
        lmm: the frozen model.
        embeddings: [U, P, D], padded on the right.
        attention: [U, P].
        image_mask: [U, P], which tokens are an image's.
        images: the image tensors of all prefixes, in their order.
    """
    inputs = lmm.decoder_inputs(embeddings, attention, image_mask, images)
    cache = DynamicCache()
    # Only keys and values are needed, so the last layer computes its output at a single position.
    first = torch.zeros(len(embeddings), 1, dtype=torch.long, device=embeddings.device)
    lmm.decode(first, inputs_embeds=embeddings, past_key_values=cache, use_cache=True, **inputs)
    next_position = lmm.family.next_position(attention, inputs)
    return PrefixCache([(layer.keys, layer.values) for layer in cache.layers], attention, next_position)


def hidden_after_prefix(
    lmm: LMM, prefix: PrefixCache, groups: Tensor, embeddings: Tensor, attention: Tensor, at: Tensor | None = None
) -> Tensor:
    """Last hidden states of the tokens after the prefixes, with gradients.

    Args:
        lmm: the frozen model.
        prefix: keys and values of U prefixes.
        groups: [B], index of each sequence's prefix.
        embeddings: [B, S, D] of the tokens after the prefixes, padded on the right.
        attention: [B, S].
        at: [B, A] positions to return; None: all.

    Returns: [B, A, D], or [B, S, D].
    """
    one_each = torch.equal(groups, torch.arange(len(prefix.next_position), device=groups.device))
    cache = Cache(layers=[_PrefixLayer(*layer, None if one_each else groups) for layer in prefix.layers])
    return decode_after_prefix(lmm, cache, prefix, groups, embeddings, attention, at)


def decode_after_prefix(
    lmm: LMM,
    cache: Cache,
    prefix: PrefixCache,
    groups: Tensor,
    embeddings: Tensor,
    attention: Tensor,
    at: Tensor | None = None,
) -> Tensor:
    """`hidden_after_prefix` with a `cache` that already holds each sequence's prefix."""
    columns = torch.arange(embeddings.shape[1], device=embeddings.device)
    return lmm.decode(
        at,
        inputs_embeds=embeddings,
        attention_mask=torch.cat([prefix.attention[groups], attention.to(prefix.attention)], dim=1),
        position_ids=lmm.family.position_ids(prefix.next_position[groups, None] + columns),
        past_key_values=cache,
        use_cache=True,
    )
