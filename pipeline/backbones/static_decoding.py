"""Greedy decoding of one batch with a cache of fixed size, whose step GPUs replay as one CUDA graph.

Every tensor of a step keeps its address and shape: the cache (transformers' `StaticLayer`) has room for the longest
answer, a mask says which of its columns hold tokens, and finished rows stay in the batch. When half of the rows have
finished, the others go on in a smaller one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, StaticLayer

from pipeline.backbones.attentions import MASKS
from pipeline.backbones.decoding import GreedyDecoder, Prompts, R
from pipeline.backbones.decoding_state import DecodingState
from pipeline.backbones.kv_cache import CacheSpace, new_cache
from pipeline.backbones.layer_hooks import attention_of
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM


class StaticDecoder(GreedyDecoder[R]):
    """As `GreedyDecoder`, for the rows of one `join`, without modules that act inside the decoder's layers."""

    _steps: _StaticStep | None = None

    @torch.no_grad()
    def join(self, prompts: Prompts, rows: Sequence[R]) -> list[R]:
        """Decode the first tokens of these rows, and free the cache's other columns."""
        assert not self.rows and self.attached is None, "one batch, and nothing attached"
        joined = super().join(prompts, rows)
        self._shrink()
        return joined

    @torch.no_grad()
    def step(self) -> list[R]:
        """Decode one token for every unfinished row; returns these rows."""
        if not self.rows:
            return []
        if self._steps is None:
            room = max(row.longest - len(row.tokens) for row in self.rows if row.finish is None)
            self._steps = _StaticStep(self.lmm, self._state, room)
        scores = self._steps(self._state.last)
        live: Sequence[int] = [number for number, row in enumerate(self.rows) if row.finish is None]
        if len(live) == len(self.rows):
            live = range(len(live))
        else:
            scores = scores[live]
        rows = self._advance(live, scores)
        if self._shrink():
            self._steps = None
        return rows

    def leave(self) -> None:
        """Finished rows leave in `_shrink`, between two steps."""

    def _shrink(self) -> bool:
        """Remove the finished rows where they are half of the batch; returns whether it did."""
        live = [number for number, row in enumerate(self.rows) if row.finish is None]
        if 2 * len(live) > len(self.rows):
            return False
        if self._steps is not None:
            self._state = self._steps.state(self._state, self.space)
        self._keep(live)
        return True


class _StaticStep:
    """One step of B rows: embeds their newest tokens and returns the scores of the next ones."""

    def __init__(self, lmm: LMM, state: DecodingState, room: int) -> None:
        """The rows of `state`, whose cache is emptied, and `room` further tokens of each."""
        self.lmm, self.width = lmm, state.attention.shape[1]
        layers, given = [], state.cache.layers
        while given:  # which frees each layer once it is copied
            layer = StaticLayer(self.width + room)
            layer.update(given[0].keys, given[0].values)
            layers.append(layer)
            del given[0]
        self.cache: Any = Cache(layers=layers)
        self.visible = pad(state.attention.bool(), (0, room))[:, None, None]  # [B, 1, 1, S]
        self.column = torch.full((1,), self.width, device=state.attention.device)
        self.positions, self.last = state.positions.clone(), state.last.clone()
        self.taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._scores: Tensor | None = None

    def __call__(self, last: Tensor) -> Tensor:
        """Scores [B, V] of the tokens behind `last` [B]."""
        self.last.copy_(last)
        self.taken += 1
        if last.device.type != "cuda":
            return self._computed()
        if self._graph is None:
            self._record()
        assert self._graph is not None and self._scores is not None
        self._graph.replay()
        return self._scores.clone()

    def _computed(self) -> Tensor:
        lmm = self.lmm
        self.visible.index_fill_(3, self.column, True)
        mask = self.visible
        if attention_of(lmm) == "eager":  # which adds its mask
            mask = torch.zeros_like(mask, dtype=lmm.dtype).masked_fill(~mask, torch.finfo(lmm.dtype).min)
        hidden = lmm.decoder(
            inputs_embeds=lmm.words(self.last[:, None]),
            attention_mask=mask,
            position_ids=lmm.family.position_ids(self.positions[:, None]),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.positions.add_(1)
        self.column.add_(1)
        return lmm.logits(hidden)[:, -1]

    def _record(self) -> None:
        """Record the step as a CUDA graph; the state is as before, for the steps before it only choose the kernels."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        moved = [self.positions, self.column, self.visible, *(layer.cumulative_length for layer in self.cache.layers)]
        before = [value.clone() for value in moved]
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._computed()
                for value, was in zip(moved, before, strict=True):
                    value.copy_(was)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._scores = self._computed()

    def state(self, state: DecodingState, space: CacheSpace) -> DecodingState:
        """The rows as they are after the steps so far, in a cache that rows can leave; this object is used up."""
        end, cache, layers = self.width + self.taken, new_cache(space), self.cache.layers
        self._graph, number = None, 0
        while layers:
            cache.update(layers[0].keys[:, :, :end], layers[0].values[:, :, :end], number)
            del layers[0]
            number += 1
        return DecodingState(cache, self.visible[:, 0, 0, :end].long(), self.positions, state.last)


def require_static(lmm: LMM) -> None:
    """Raise UserError where this model cannot decode with a cache of fixed size."""
    reason, used = lmm.family.needs_one_pass(), attention_of(lmm)
    if not reason and used not in MASKS:
        reason = f"attention '{used}' takes no mask with a row per position, only {' and '.join(MASKS)} do"
    if reason:
        raise UserError(
            f"evaluate.static_cache is not possible with this model: {reason}. Set evaluate.static_cache to false."
        )
