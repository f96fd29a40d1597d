"""The decoder in two passes: what sequences begin with, once and without gradients, then what stands behind it.

A decoder is causal, so the beginning of a sequence does not depend on what follows. Its keys and values are computed
once for all sequences that begin alike and handed to the pass over the rest (engineering.md G, "two passes"). All
tensors are padded on the right; a mask with gaps and explicit positions make that equal to one pass.
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
class Beginning:
    """What the decoder keeps of U beginnings: keys and values of every layer [U, heads, P, d]."""

    layers: Sequence[tuple[Tensor, Tensor]]
    attention: Tensor  # [U, P]
    following: Tensor  # [U] position of the token that follows


class _Shared(CacheLayerMixin):
    """One layer's keys and values of the beginnings, each given to all sequences of its group.

    They are spread over the sequences where they are used, layer by layer, and nothing is kept of the second pass:
    its keys and values have gradients.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, groups: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values, self.groups = keys, values, groups
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the beginning is there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, P + S, d] of the beginnings and of the pass itself."""
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        if self.groups is not None:
            keys, values = keys[self.groups], values[self.groups]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys, and where they begin."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the beginning, padding included."""
        assert self.keys is not None
        return self.keys.shape[-2]

    def get_max_length(self) -> int:
        """No limit."""
        return -1


@torch.no_grad()
def begin(lmm: LMM, embeddings: Tensor, attention: Tensor, places: Tensor, images: dict[str, Tensor]) -> Beginning:
    """Run the decoder over U beginnings: `embeddings` [U, P, D], `attention` and the image's `places` [U, P]."""
    inputs = lmm.family.decoder_inputs(embeddings, attention, places, images)
    cache = DynamicCache()
    # Nothing but keys and values is needed, so the last layer need not give its output but somewhere.
    first = torch.zeros(len(embeddings), 1, dtype=torch.long, device=embeddings.device)
    lmm.decode(first, inputs_embeds=embeddings, past_key_values=cache, use_cache=True, **inputs)
    following = lmm.family.following(attention, inputs)
    return Beginning([(layer.keys, layer.values) for layer in cache.layers], attention, following)


def hidden_behind(
    lmm: LMM, beginning: Beginning, groups: Tensor, embeddings: Tensor, attention: Tensor, at: Tensor | None = None
) -> Tensor:
    """Last hidden states [B, S, D] of sequences that stand behind beginnings, with gradients.

    `groups` [B]: whose beginning each has; `embeddings` [B, S, D] and `attention` [B, S]; with `at` [B, A] the states
    [B, A, D] of these positions.
    """
    whole = torch.equal(groups, torch.arange(len(beginning.following), device=groups.device))
    cache = Cache(layers=[_Shared(*layer, None if whole else groups) for layer in beginning.layers])
    return _continue(lmm, cache, beginning, groups, embeddings, attention, at)


def _continue(
    lmm: LMM,
    cache: Cache,
    beginning: Beginning,
    groups: Tensor,
    embeddings: Tensor,
    attention: Tensor,
    at: Tensor | None = None,
) -> Tensor:
    columns = torch.arange(embeddings.shape[1], device=embeddings.device)
    return lmm.decode(
        at,
        inputs_embeds=embeddings,
        attention_mask=torch.cat([beginning.attention[groups], attention.to(beginning.attention)], dim=1),
        position_ids=lmm.family.positions(beginning.following[groups, None] + columns),
        past_key_values=cache,
        use_cache=True,
    )


@torch.no_grad()
def generate_behind(
    lmm: LMM, beginning: Beginning, groups: Tensor, embeddings: Tensor, attention: Tensor, max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers (token ids up to the one that ends them) to sequences behind beginnings; see `hidden_behind`.

    The checkpoint's own rules of generation (a penalty for repetition and the like) hold as in `LMM.generate`.
    """
    cache = DynamicCache()
    for number, (keys, values) in enumerate(beginning.layers):
        cache.update(keys[groups], values[groups], number)
    lengths = attention.sum(1)
    hidden = _continue(lmm, cache, beginning, groups, embeddings, attention, lengths[:, None] - 1)
    mask = torch.cat([beginning.attention[groups], attention.to(beginning.attention)], dim=1)
    scores = lmm.logits(hidden[:, -1])
    stops = torch.tensor(lmm.stops, device=groups.device)
    rules = lmm.generation_rules(max_new_tokens)
    tokens = groups.new_zeros(len(groups), 0)
    going = torch.ones_like(groups, dtype=torch.bool)
    ends = torch.full_like(groups, max_new_tokens)  # tokens of each answer
    for number in range(max_new_tokens):
        token = rules(tokens, scores).argmax(-1)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        stopped = going & torch.isin(token, stops)
        ends = ends.masked_fill(stopped, number + 1)
        going = going & ~stopped
        if number + 1 == max_new_tokens or not going.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        hidden = lmm.decoder(
            inputs_embeds=lmm.words(token[:, None]),
            attention_mask=mask,
            position_ids=lmm.family.positions((beginning.following[groups] + lengths + number)[:, None]),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        scores = lmm.logits(hidden[:, -1])
    return [row[:end] for row, end in zip(tokens.tolist(), ends.tolist(), strict=True)]
