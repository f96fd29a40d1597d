"""Greedy decoding of a batch that rows join and leave: the one decoder under evaluation, prediction and serving.

A row gets the token with the highest score until it has a stop token or its longest length; it leaves the batch with
that token, so that no step is computed for an answer that is finished. Rows do not influence each other: what shares
a batch changes the order in which numbers are added, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from pipeline.backbones.decoding_state import DecodingState, ParkedState
from pipeline.backbones.generation_rules import generation_rules
from pipeline.backbones.kv_cache import ROOM, layers_of, new_cache
from pipeline.backbones.prefix_cache import PrefixCache, decode_after_prefix
from pipeline.data.selection import Selection

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM

# A context in which the modules that a batch's rows have (low-rank updates, say) act on the decoder's calls.
Attached = Callable[[Selection], AbstractContextManager[None]]


@dataclass(frozen=True)
class Prompts:
    """What the decoder reads of B prompts, or of what follows the prefixes that they share."""

    embeddings: Tensor  # [B, N, D]
    attention: Tensor  # [B, N], padded on the left, behind a prefix on the right
    image_mask: Tensor | None = None  # [B, N] which tokens are an image's, for families that need to know
    images: dict[str, Tensor] | None = None  # for the same
    prefix: PrefixCache | None = None  # of U prefixes
    groups: Tensor | None = None  # [B] whose prefix each prompt has
    selection: Selection | None = None  # modules of each prompt, where some are attached to the decoder


@dataclass
class Row:
    """One answer in progress: what the caller knows it by, the most tokens that it may have, and those it has."""

    key: Any
    longest: int
    # Fewer tokens than these do not end it; None: what the checkpoint says.
    shortest: int | None = field(default=None, kw_only=True)
    prompt_tokens: int = field(default=0, kw_only=True)
    tokens: list[int] = field(default_factory=list, kw_only=True)
    finish: str | None = field(default=None, kw_only=True)  # "stop" or "length" once it is over


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Parked(Generic[R]):
    """Rows that left the batch for a while, in the host's memory."""

    rows: list[R]
    state: ParkedState

    def halves(self) -> list[Parked[R]]:
        """The same rows in two."""
        half = len(self.rows) // 2
        return [Parked(self.rows[part], self.state.part(part)) for part in (slice(0, half), slice(half, None))]


class GreedyDecoder(Generic[R]):
    """The rows being decoded, with their keys and values.

    A mask and explicit positions make padding and gaps count for nothing. Sliding-window layers keep the keys of all
    tokens too; the architecture's own mask leaves out those before the window. Where memory runs out in `join` or
    `step`, the rows are what they were before.

    Each row keeps its own modules: every call of the decoder runs inside `attached`, which is given the selection of
    the rows in their order at the time; None: no modules are attached to the decoder.

    Never under ZeRO-3: ranks whose answers end at different lengths would wait for each other.
    """

    def __init__(self, lmm: LMM, attached: Attached | None = None) -> None:
        self.lmm = lmm
        self.attached = attached
        self.rows: list[R] = []
        settings, device = lmm.model.generation_config, lmm.model.device
        stops = lmm.stops
        self._rules = generation_rules(settings, stops, device)
        self._settings, self._stops = settings, frozenset(stops)
        self._stop_list = torch.tensor(stops, device=device)
        self._state = DecodingState.empty(device)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self._state.nbytes

    @torch.no_grad()
    def join(self, prompts: Prompts, rows: Sequence[R]) -> list[R]:
        """Begin the answers to prompts; returns these rows, which have their first token."""
        cache = new_cache(min(ROOM, max(row.longest for row in rows)))
        with self._modules(prompts.selection):
            hidden, attention, positions = self._read(prompts, cache)
        scores = self.lmm.logits(hidden)[:, -1]
        lengths = attention.sum(1).tolist()
        self._append(DecodingState(cache, attention, positions, torch.zeros_like(positions), prompts.selection))
        for row, length in zip(rows, lengths, strict=True):
            row.prompt_tokens = length
        self.rows += rows
        return self._advance(range(len(self.rows) - len(rows), len(self.rows)), scores)

    def _append(self, state: DecodingState) -> None:
        if self.rows:
            self._state.append(state)
        else:
            self._state = state

    def _modules(self, selection: Selection | None) -> AbstractContextManager[None]:
        """A context for a call of the decoder on rows with these modules."""
        if self.attached is None:
            return nullcontext()
        assert selection is not None, "modules are attached to the decoder, so every row has to say which"
        return self.attached(selection)

    def _read(self, prompts: Prompts, cache: Cache) -> tuple[Tensor, Tensor, Tensor]:
        """Last hidden states [B, 1, D] of prompts, their attention [B, S] and next positions [B]; fills the cache."""
        lmm, attention = self.lmm, prompts.attention
        last = attention.shape[1] - 1 - attention.flip(1).argmax(1, keepdim=True)
        if prompts.prefix is not None and prompts.groups is not None:
            prefix, groups = prompts.prefix, prompts.groups
            for number, (keys, values) in enumerate(prefix.layers):
                cache.update(keys[groups], values[groups], number)
            hidden = decode_after_prefix(lmm, cache, prefix, groups, prompts.embeddings, attention, last)
            whole = torch.cat([prefix.attention[groups], attention.to(prefix.attention)], dim=1)
            return hidden, whole, prefix.next_position[groups] + attention.sum(1)
        inputs = lmm.decoder_inputs(prompts.embeddings, attention, prompts.image_mask, prompts.images)
        # Positions count from each row's first token, not from the padding before it.
        inputs.setdefault("position_ids", (attention.cumsum(1) - 1).clamp(min=0))
        hidden = lmm.decode(last, inputs_embeds=prompts.embeddings, past_key_values=cache, use_cache=True, **inputs)
        return hidden, attention, lmm.family.next_position(attention, inputs)

    @torch.no_grad()
    def step(self) -> list[R]:
        """One more token for every row; returns the rows that got it, of which the finished ones have left."""
        if not self.rows:
            return []
        state = self._state
        width = state.attention.shape[1]
        attention = pad(state.attention, (0, 1), value=1)
        try:
            with self._modules(state.selection):
                hidden = self.lmm.decoder(
                    inputs_embeds=self.lmm.words(state.last[:, None]),
                    attention_mask=attention,
                    position_ids=self.lmm.family.position_ids(state.positions[:, None]),
                    past_key_values=state.cache,
                    use_cache=True,
                ).last_hidden_state
            scores = self.lmm.logits(hidden)[:, -1]
        except Exception:
            for layer in layers_of(state.cache):
                layer.cut(width)  # the first layers may have the token already
            raise
        state.attention, state.positions = attention, state.positions + 1
        return self._advance(range(len(self.rows)), scores)

    def _advance(self, numbers: range, scores: Tensor) -> list[R]:
        """Give the rows of these numbers their best token by scores [n, V]; returns them, finished ones leave."""
        rows = [self.rows[number] for number in numbers]
        best = self._ruled(rows, scores).argmax(-1)
        self._state.last[numbers.start : numbers.stop] = best
        for row, token in zip(rows, best.tolist(), strict=True):
            row.tokens.append(token)
            if token in self._stops:
                row.finish = "stop"
            elif len(row.tokens) >= row.longest:
                row.finish = "length"
        self.leave()
        return rows

    def _ruled(self, rows: Sequence[R], scores: Tensor) -> Tensor:
        """Scores [n, V] of the rows' next tokens as the checkpoint's rules change them."""
        if len(self._rules):
            # A processor is given answers of one length.
            for places in _by_length(rows):
                so_far = [rows[place].tokens for place in places]
                given = torch.tensor(so_far, dtype=torch.long, device=scores.device)
                scores[places] = self._rules(given, scores[places])
        early = [place for place, row in enumerate(rows) if len(row.tokens) < self._fewest(row)]
        if early:
            scores[torch.tensor(early)[:, None], self._stop_list] = -torch.inf
        ending = self._settings.forced_eos_token_id
        if ending is not None:
            for place, row in enumerate(rows):
                if len(row.tokens) == row.longest - 1:
                    scores[place] = -torch.inf
                    scores[place, ending] = 0
        return scores

    def _fewest(self, row: R) -> int:
        """Tokens that a row has at least."""
        if row.shortest is not None:
            return row.shortest
        # `min_length` counts the prompt.
        whole = (self._settings.min_length or 0) - row.prompt_tokens
        return max(self._settings.min_new_tokens or 0, whole)

    def park(self, number: int) -> Parked[R]:
        """Take the last `number` rows out, to come back by `resume`."""
        first = len(self.rows) - number
        parked = Parked(self.rows[first:], self._state.parked(first))
        self._keep(list(range(first)))
        self._state.release()
        return parked

    @torch.no_grad()
    def resume(self, parked: Parked[R]) -> None:
        """Go on with rows that were parked."""
        self._append(parked.state.on(self.lmm.model.device))
        self.rows += parked.rows

    def leave(self) -> None:
        """Take out the rows that are finished."""
        self._keep([number for number, row in enumerate(self.rows) if row.finish is None])

    def drop(self, keys: set[Any]) -> None:
        """Take out rows that nobody waits for any more."""
        self._keep([number for number, row in enumerate(self.rows) if row.key not in keys])

    def _keep(self, kept: list[int]) -> None:
        """Keep these rows, in ascending order."""
        if len(kept) == len(self.rows):
            return
        if kept:
            self.rows = [self.rows[number] for number in self._state.keep(kept)]
        else:
            self.rows, self._state = [], DecodingState.empty(self.lmm.model.device)


def generate(
    lmm: LMM,
    prompts: Prompts,
    max_new_tokens: int,
    min_new_tokens: int | None = None,
    attached: Attached | None = None,
) -> list[list[int]]:
    """Greedy answers to prompts: token ids up to and with the one that ends each.

    Args:
        lmm: the frozen model, whole on one device.
        prompts: what it reads.
        max_new_tokens: an answer's most tokens.
        min_new_tokens: no answer ends before it has so many; None: what the checkpoint says.
        attached: as for `GreedyDecoder`.
    """
    decoder = GreedyDecoder[Row](lmm, attached)
    rows = [Row(number, max_new_tokens, shortest=min_new_tokens) for number in range(len(prompts.attention))]
    decoder.join(prompts, rows)
    while decoder.rows:
        decoder.step()
    return [row.tokens for row in rows]


def _by_length(rows: Sequence[Row]) -> Iterator[list[int]]:
    """The places of rows whose answers have the same number of tokens."""
    for length in sorted({len(row.tokens) for row in rows}):
        yield [place for place, row in enumerate(rows) if len(row.tokens) == length]
