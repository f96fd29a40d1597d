"""Greedy decoding with continuous batching: the decoder of evaluation, prediction and serving.

Each row gets the token with the highest score until that is a stop token or the row reaches its length limit; then the
row leaves the batch, so that no step is computed for a finished answer. Rows do not influence each other: the
composition of a batch changes only the order of floating-point sums.
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
from pipeline.backbones.kv_cache import ROOM, CacheSpace, layers_of
from pipeline.backbones.prefix_cache import PrefixCache, decode_after_prefix
from pipeline.backbones.weigh import Weigh
from pipeline.data.selection import Selection

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM

# Makes a context in which the selected modules (for example low-rank updates) act on the decoder, given the selection
# of the rows and `Prompts.inserted` of their sequences.
Attached = Callable[[Selection, Tensor | None], AbstractContextManager[None]]


@dataclass(frozen=True)
class Prompts:
    """The decoder's inputs for B prompts, or for the parts of them that follow a cached prefix."""

    embeddings: Tensor  # [B, N, D]
    attention: Tensor  # [B, N], padded on the left; after a prefix on the right
    image_mask: Tensor | None = None  # [B, N] which tokens are an image's; for families with `needs_image_mask`
    images: dict[str, Tensor] | None = None  # for the same families
    prefix: PrefixCache | None = None  # of U prefixes
    groups: Tensor | None = None  # [B] index of each prompt's prefix
    selection: Selection | None = None  # each prompt's modules; required where `attached` is given
    # [B, S] number from 1 of the inserted row at each column, a prefix's columns included, 0: none; None: not needed
    inserted: Tensor | None = None


@dataclass
class Row:
    """One answer in progress: the caller's key, its length limits in tokens, and its tokens so far."""

    key: Any
    longest: int
    # No stop token before this many tokens; None: as generation_config.json says.
    shortest: int | None = field(default=None, kw_only=True)
    prompt_tokens: int = field(default=0, kw_only=True)
    tokens: list[int] = field(default_factory=list, kw_only=True)
    finish: str | None = field(default=None, kw_only=True)  # "stop" or "length" once it is finished
    weigh: Weigh | None = field(default=None, kw_only=True)  # what changes the decoder's scores, see `Weigh`


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Parked(Generic[R]):
    """Rows taken out of the batch with their keys and values, in host memory, to be resumed later."""

    rows: list[R]
    state: ParkedState

    def halves(self) -> list[Parked[R]]:
        """The rows split into two parts."""
        half = len(self.rows) // 2
        return [Parked(self.rows[part], self.state.part(part)) for part in (slice(0, half), slice(half, None))]


class GreedyDecoder(Generic[R]):
    """The rows being decoded, with their keys and values.

    The attention mask and explicit positions exclude padding and gaps. Sliding-window layers keep the keys of all
    tokens too; the architecture's own mask excludes those before the window. If memory runs out in `join` or `step`,
    the rows are unchanged.

    Every call of the decoder and of the output layer runs inside `attached`, which gets the selection of the rows in
    their current order, so that each row keeps its own modules; None: no modules act on the model.

    Not usable under ZeRO-3: ranks whose answers end at different lengths would wait for each other (docs/design.md
    7.4). Where the layers are divided over ranks (`pipeline.backbones.sharded`), all of these decode the same rows.
    """

    def __init__(self, lmm: LMM, attached: Attached | None = None, space: CacheSpace | None = None) -> None:
        self.lmm = lmm
        self.attached = attached
        self.space = CacheSpace() if space is None else space  # of the keys and values
        self.rows: list[R] = []
        settings, device = lmm.model.generation_config, lmm.model.device
        stops = lmm.stops
        self._rules = generation_rules(settings, stops, device)
        self._settings, self._stops = settings, frozenset(stops)
        self._stop_list = torch.tensor(stops, device=device)
        self._state = DecodingState.empty(device, self.space)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory for keys and values."""
        return self.space.nbytes

    @torch.no_grad()
    def join(self, prompts: Prompts, rows: Sequence[R]) -> list[R]:
        """Add rows for these prompts and decode their first tokens; returns the rows."""
        width = prompts.attention.shape[1] + (0 if prompts.prefix is None else prompts.prefix.attention.shape[1])
        cache = self._opened(rows, width)
        with self._modules(prompts.selection, prompts.inserted):
            hidden, attention, positions = self._read(prompts, cache)
            scores = self.lmm.logits(hidden)[:, -1]
        lengths = attention.sum(1).tolist()
        last = torch.zeros_like(positions)
        self._state.append(DecodingState(cache, attention, positions, last, prompts.selection, prompts.inserted))
        for row, length in zip(rows, lengths, strict=True):
            row.prompt_tokens = length
        self.rows += rows
        return self._advance(range(len(self.rows) - len(rows), len(self.rows)), scores)

    def _opened(self, rows: Sequence[R], width: int) -> Cache:
        """A cache for the `width` columns of joining rows, with columns after them for tokens to come."""
        room = max(row.longest - len(row.tokens) for row in [*self.rows, *rows])
        return self._state.opened(self.space, len(rows), width, room if self.space.whole else min(ROOM, room))

    def _modules(self, selection: Selection | None, inserted: Tensor | None) -> AbstractContextManager[None]:
        """The context for a call of the decoder on rows with these modules."""
        if self.attached is None:
            return nullcontext()
        assert selection is not None, "modules are attached to the decoder, so every row needs a selection"
        return self.attached(selection, inserted)

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
        """Decode one token for every row; returns those rows, of which finished ones have left the batch."""
        if not self.rows:
            return []
        state = self._state
        width = state.attention.shape[1]
        attention = pad(state.attention, (0, 1), value=1)
        inserted = None if state.inserted is None else pad(state.inserted, (0, 1))
        try:
            with self._modules(state.selection, inserted):
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
                layer.cut(width)  # layers before the failing one have already stored the token
            raise
        state.attention, state.inserted, state.positions = attention, inserted, state.positions + 1
        return self._advance(range(len(self.rows)), scores)

    def _advance(self, numbers: Sequence[int], scores: Tensor) -> list[R]:
        """Append each of these rows' best token by scores [n, V] and let finished ones leave; returns the rows."""
        rows = [self.rows[number] for number in numbers]
        best = self.lmm.agreed(self._ruled(rows, scores).argmax(-1))
        # A slice where it is one, because an index would be copied to the GPU for every token.
        places: Any = slice(numbers.start, numbers.stop) if isinstance(numbers, range) else list(numbers)
        self._state.last[places] = best
        for row, token in zip(rows, best.tolist(), strict=True):
            row.tokens.append(token)
            if token in self._stops:
                row.finish = "stop"
            elif len(row.tokens) >= row.longest:
                row.finish = "length"
        self.leave()
        return rows

    def _ruled(self, rows: Sequence[R], scores: Tensor) -> Tensor:
        """Weigh the scores [n, V] of the rows' next tokens, and apply the rules of generation_config.json to them."""
        weighed = [(place, row.weigh) for place, row in enumerate(rows) if row.weigh is not None]
        if weighed:
            places = [place for place, _ in weighed]
            so_far = [rows[place].tokens for place in places]
            scores[places] = weighed[0][1].weighed([weigh for _, weigh in weighed], so_far, scores[places])
        if len(self._rules):
            # transformers' processors take the tokens so far as one tensor, so rows are grouped by length.
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
        """Number of tokens before which a row may not stop."""
        if row.shortest is not None:
            return row.shortest
        # transformers' `min_length` includes the prompt.
        whole = (self._settings.min_length or 0) - row.prompt_tokens
        return max(self._settings.min_new_tokens or 0, whole)

    def park(self, number: int) -> Parked[R]:
        """Move the last `number` rows to host memory; `resume` brings them back."""
        first = len(self.rows) - number
        parked = Parked(self.rows[first:], self._state.parked(first))
        self._keep(list(range(first)))
        self.release()
        return parked

    def release(self) -> None:
        """Free the memory that the rows do not use."""
        self._state.release()

    @torch.no_grad()
    def resume(self, parked: Parked[R]) -> None:
        """Bring parked rows back into the batch."""
        cache = self._opened(parked.rows, parked.state.attention.shape[1])
        self._state.append(parked.state.on(self.lmm.model.device, cache))
        self.rows += parked.rows

    def leave(self) -> None:
        """Remove the finished rows."""
        self._keep([number for number, row in enumerate(self.rows) if row.finish is None])

    def drop(self, keys: set[Any]) -> None:
        """Remove the rows with these keys."""
        self._keep([number for number, row in enumerate(self.rows) if row.key not in keys])

    def _keep(self, kept: list[int]) -> None:
        """Keep these rows, in ascending order."""
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in self._state.keep(kept)]


def generate(
    lmm: LMM,
    prompts: Prompts,
    max_new_tokens: int,
    min_new_tokens: int | None = None,
    attached: Attached | None = None,
    decoder: type[GreedyDecoder[Row]] | None = None,
    weigh: Sequence[Weigh | None] | None = None,
) -> list[list[int]]:
    """Greedy answers to prompts: token ids, the stop token included.

    Args:
        lmm: the frozen model, not partitioned.
        prompts: the decoder's inputs.
        max_new_tokens: maximum length of an answer.
        min_new_tokens: minimum length of an answer; None: as generation_config.json says.
        attached: as for `GreedyDecoder`.
        decoder: another class of decoders; None: `GreedyDecoder`.
        weigh: what changes the scores of each prompt's tokens; None: nothing.
    """
    decoding = (decoder or GreedyDecoder[Row])(lmm, attached)
    rows = [
        Row(number, max_new_tokens, shortest=min_new_tokens, weigh=one)
        for number, one in enumerate(weigh or [None] * len(prompts.attention))
    ]
    decoding.join(prompts, rows)
    while decoding.rows:
        decoding.step()
    return [row.tokens for row in rows]


def _by_length(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Indices of rows, grouped by the number of tokens of their answers."""
    for length in sorted({len(row.tokens) for row in rows}):
        yield [place for place, row in enumerate(rows) if len(row.tokens) == length]
