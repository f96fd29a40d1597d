"""Continuous batching: sequences with different prompt sets decoded together, joining and leaving at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from pipeline.adapter.answering import Answerer, Routed
from pipeline.data.collate import collate_prompts
from pipeline.prompts.embedding import embed_with_sets
from pipeline.prompts.generation import Decoding, InsertedSets, generate_answers
from pipeline.serve.cache import cache_of, layers_of, new_cache
from pipeline.serve.memory import Extent


@dataclass
class Running:
    """One answer in progress: its tokens so far, its longest length, and what the caller knows it by.

    The text ends before the first of `stops` that it holds.
    """

    key: Any
    longest: int
    stops: Sequence[str] = ()
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None  # "stop" or "length" once it is over
    text: str = ""  # of the tokens so far

    @property
    def extent(self) -> Extent:
        """Its tokens in the cache, and those that may follow."""
        return Extent(self.prompt_tokens + len(self.tokens), self.longest - len(self.tokens))


@dataclass(frozen=True)
class Parked:
    """Rows that left the batch for a while, in the host's memory."""

    rows: list[Running]
    layers: list[tuple[Tensor, Tensor]]  # keys and values [B, heads, S, d]
    attention: Tensor  # [B, S]
    following: Tensor  # [B]
    last: list[int]

    def halves(self) -> list[Parked]:
        """The same rows in two."""
        half = len(self.rows) // 2
        return [self._part(slice(0, half)), self._part(slice(half, None))]

    def _part(self, rows: slice) -> Parked:
        layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        return Parked(self.rows[rows], layers, self.attention[rows], self.following[rows], self.last[rows])


class RunningBatch:
    """The sequences being decoded; greedy, so an answer does not depend on what it shares a batch with.

    All rows end in the last column: a row that joins is padded on the left to the others' width, or they to its. Where
    memory runs out in `join` or `step`, the rows are what they were before.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.lmm = answerer.lmm
        self.insertion = answerer.source.method.insertion
        self.bank = answerer.pool.prompts.to(self.lmm.model.device, self.lmm.dtype)
        self.rows: list[Running] = []
        self.rules = self.lmm.generation_rules(1 << 20)
        self.stops = set(self.lmm.stops)
        # Architectures that cannot go on from kept keys and values are generated whole, batch by batch.
        self.whole = bool(self.lmm.family.needs_one_pass())
        self._cache = new_cache()
        self._attention = torch.zeros(0, 0)
        self._following = torch.zeros(0)
        self._last: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(layer.nbytes for layer in layers_of(self._cache))

    @torch.no_grad()
    def join(self, routed: Routed, sequences: Sequence[Running]) -> list[Running]:
        """Begin the answers to routed questions; returns those that got their first token, which is all of them."""
        if self.whole:
            return self._generate_whole(routed, sequences)
        batch = collate_prompts(routed.examples, range(len(sequences)), routed.selected).to(self.lmm.model.device)
        embeddings, attention, places = embed_with_sets(self.lmm, batch, self.bank, self.insertion)
        inputs = self.lmm.family.decoder_inputs(embeddings, attention, places, batch.images)
        # Positions count from each row's first token, not from the padding before it.
        inputs.setdefault("position_ids", (attention.cumsum(1) - 1).clamp(min=0))
        cache = new_cache()
        hidden = self.lmm.decoder(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, **inputs)
        scores = self.lmm.logits(hidden.last_hidden_state[:, -1])
        following = self.lmm.family.following(attention, inputs)
        self._append(cache, attention, following)
        for number, sequence in enumerate(sequences):
            sequence.prompt_tokens = int(attention[number].sum())
        self.rows += sequences
        self._last += [0] * len(sequences)
        new = range(len(self.rows) - len(sequences), len(self.rows))
        self._take(new, scores)
        return self._leave(new)

    @torch.no_grad()
    def step(self) -> list[Running]:
        """One more token for every row; returns the rows that got it, the finished ones have left the batch."""
        if not self.rows:
            return []
        device, width = self._attention.device, self._attention.shape[1]
        attention = pad(self._attention, (0, 1), value=1)
        try:
            hidden = self.lmm.decoder(
                inputs_embeds=self.lmm.words(torch.tensor(self._last, device=device)[:, None]),
                attention_mask=attention,
                position_ids=self.lmm.family.positions(self._following[:, None]),
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
            scores = self.lmm.logits(hidden[:, -1])
        except Exception:
            for layer in layers_of(self._cache):
                layer.cut(width)  # of those that have the token already
            raise
        self._attention, self._following = attention, self._following + 1
        everyone = range(len(self.rows))
        self._take(everyone, scores)
        return self._leave(everyone)

    def park(self, number: int) -> Parked:
        """Take the last `number` rows out, to come back by `resume`."""
        first = len(self.rows) - number
        layers = [layer.taken(first) for layer in layers_of(self._cache)]
        attention, following = (part[first:].to("cpu", copy=True) for part in (self._attention, self._following))
        parked = Parked(self.rows[first:], layers, attention, following, self._last[first:])
        self._keep(list(range(first)))
        for layer in layers_of(self._cache):
            layer.release()
        return parked

    @torch.no_grad()
    def resume(self, parked: Parked) -> None:
        """Go on with rows that were parked."""
        device = self.lmm.model.device
        self._append(cache_of(parked.layers, device), parked.attention.to(device), parked.following.to(device))
        self.rows += parked.rows
        self._last += parked.last

    def drop(self, keys: set[Any]) -> None:
        """Take out sequences that nobody waits for any more."""
        self._keep([number for number, row in enumerate(self.rows) if row.key not in keys])

    def _append(self, cache: Cache, attention: Tensor, following: Tensor) -> None:
        """Take in rows behind the others; where memory runs out, the others are what they were."""
        if not self.rows:
            self._cache, self._attention, self._following = cache, attention, following
            return
        rows, old, width = len(self.rows), self._attention.shape[1], max(self._attention.shape[1], attention.shape[1])
        joined = torch.cat([_widened(self._attention, width), _widened(attention, width)])
        behind = torch.cat([self._following, following])
        done = []
        try:
            for layer, added in zip(layers_of(self._cache), layers_of(cache), strict=True):
                layer.append(added, width)
                done.append(layer)
        except Exception:
            for layer in done:
                layer.narrow(rows, width - old)
            raise
        self._attention, self._following = joined, behind

    def _take(self, rows: Sequence[int], scores: Tensor) -> None:
        """Append each row's best next token, given their scores [n, V]."""
        for place, number in enumerate(rows):
            row = self.rows[number]
            if len(self.rules):
                so_far = torch.tensor([row.tokens], dtype=torch.long, device=scores.device)
                scores[place] = self.rules(so_far, scores[place : place + 1])[0]
        for number, token in zip(rows, scores.argmax(-1).tolist(), strict=True):
            row = self.rows[number]
            row.tokens.append(token)
            self._last[number] = token
            if token in self.stops:
                row.finish = "stop"
            elif len(row.tokens) >= row.longest:
                row.finish = "length"
            row.text, stopped = before_stops(self._decode(row.tokens), row.stops)
            if stopped:
                row.finish = "stop"

    def _decode(self, tokens: list[int]) -> str:
        return self.lmm.conversation.decode(tokens)

    def _leave(self, rows: Sequence[int]) -> list[Running]:
        told = [self.rows[number] for number in rows]
        self._keep([number for number, row in enumerate(self.rows) if row.finish is None])
        return told

    def _keep(self, kept: list[int]) -> None:
        """Keep these rows, in ascending order, taking no memory: the last ones move to the places of those gone."""
        if len(kept) == len(self.rows):
            return
        if not kept:
            self.rows, self._last, self._cache = [], [], new_cache()
            return
        staying = set(kept)
        holes = [number for number in range(len(kept)) if number not in staying]
        movers = [number for number in kept if number >= len(kept)]
        order = list(range(len(kept)))
        for source, target in zip(movers, holes, strict=True):
            order[target] = source
            for layer in layers_of(self._cache):
                layer.move(source, target)
        self.rows = [self.rows[number] for number in order]
        self._last = [self._last[number] for number in order]
        index = torch.tensor(order, device=self._attention.device)
        attention = self._attention[index]
        first = int(attention.any(0).float().argmax())  # columns before it are padding in every row that stays
        self._attention, self._following = attention[:, first:], self._following[index]
        for layer in layers_of(self._cache):
            layer.narrow(len(kept), first)

    def _generate_whole(self, routed: Routed, sequences: Sequence[Running]) -> list[Running]:
        for longest in sorted({sequence.longest for sequence in sequences}):
            mine = [number for number, sequence in enumerate(sequences) if sequence.longest == longest]
            inserted = InsertedSets(self.bank, routed.selected, self.insertion)
            texts = generate_answers(self.lmm, routed.examples, mine, inserted, Decoding(longest, len(mine)))
            for number, text in texts.items():
                sequence = sequences[number]
                # The tokens themselves are not handed out: their number is that of the text's.
                sequence.tokens = self.lmm.tokenizer(text, add_special_tokens=False).input_ids[:longest]
                sequence.finish = "length" if len(sequence.tokens) >= longest else "stop"
                sequence.text, stopped = before_stops(text, sequence.stops)
                if stopped:
                    sequence.finish = "stop"
                sequence.prompt_tokens = len(routed.examples[number].prompt)
        return list(sequences)


def _widened(attention: Tensor, width: int) -> Tensor:
    """Which tokens are read [B, S], with zeros in front, so that it is `width` long."""
    return pad(attention, (width - attention.shape[1], 0))


def before_stops(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stops that it holds, and whether it holds one."""
    found = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)
