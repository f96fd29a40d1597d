"""Prefix cache: the keys and values of what sequences begin with, computed once for all that begin alike.

A decoder is causal, so the keys and values of a prefix do not depend on what follows. They are computed without
gradients, once per prefix (an image, say, with several questions about it), and handed to the pass over the rest. All
tensors are padded on the right; a mask with gaps and explicit positions make the two passes equal to one.
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
    """What the decoder keeps of U prefixes: keys and values of every layer [U, heads, P, d]."""

    layers: Sequence[tuple[Tensor, Tensor]]
    attention: Tensor  # [U, P]
    next_position: Tensor  # [U] position of the token behind each prefix


class _PrefixLayer(CacheLayerMixin):
    """One layer's keys and values of the prefixes, each given to all sequences that have it.

    They are gathered per sequence where the layer uses them, so that only one layer's copy exists at a time. The keys
    and values of the second pass are not kept: they have gradients.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, groups: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values, self.groups = keys, values, groups
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the prefix is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, P + S, d] of the prefixes and of the pass itself."""
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        if self.groups is not None:
            keys, values = keys[self.groups], values[self.groups]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the prefix, padding included."""
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
        images: the image tensors of all prefixes in turn.
    """
    inputs = lmm.decoder_inputs(embeddings, attention, image_mask, images)
    cache = DynamicCache()
    # Only keys and values are wanted, so the last layer need compute its output at one position only.
    first = torch.zeros(len(embeddings), 1, dtype=torch.long, device=embeddings.device)
    lmm.decode(first, inputs_embeds=embeddings, past_key_values=cache, use_cache=True, **inputs)
    next_position = lmm.family.next_position(attention, inputs)
    return PrefixCache([(layer.keys, layer.values) for layer in cache.layers], attention, next_position)


def hidden_after_prefix(
    lmm: LMM, prefix: PrefixCache, groups: Tensor, embeddings: Tensor, attention: Tensor, at: Tensor | None = None
) -> Tensor:
    """Last hidden states of what follows prefixes, with gradients.

    Args:
        lmm: the frozen model.
        prefix: keys and values of U prefixes.
        groups: [B], whose prefix each sequence has.
        embeddings: [B, S, D] of the rest, padded on the right.
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
    """`hidden_after_prefix` with a `cache` that already gives each sequence its prefix."""
    columns = torch.arange(embeddings.shape[1], device=embeddings.device)
    return lmm.decode(
        at,
        inputs_embeds=embeddings,
        attention_mask=torch.cat([prefix.attention[groups], attention.to(prefix.attention)], dim=1),
        position_ids=lmm.family.position_ids(prefix.next_position[groups, None] + columns),
        past_key_values=cache,
        use_cache=True,
    )
