"""Continuous batching: sequences with different prompt sets decoded together, joining and leaving at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicCache

from pipeline.answering import Answerer, Routed
from pipeline.data.collate import collate_prompts
from pipeline.generation import generate_answers
from pipeline.prompts.embedding import embed_with_sets


@dataclass
class Running:
    """One answer in progress: its tokens so far, its longest length, and what the caller knows it by."""

    key: Any
    longest: int
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None  # "stop" or "length" once it is over
    text: str = ""  # of the tokens so far


class RunningBatch:
    """The sequences being decoded; greedy, so an answer does not depend on what it shares a batch with.

    All rows end in the last column: a row that joins is padded on the left to the others' width, or they to its.
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
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys and values [B, heads, S, d]
        self._attention = torch.zeros(0, 0)
        self._following = torch.zeros(0)
        self._last: list[int] = []

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
        cache = DynamicCache()
        hidden = self.lmm.decoder(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, **inputs)
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        following = self.lmm.family.following(attention, inputs)
        if not self.rows:
            self._layers, self._attention, self._following = layers, attention, following
        else:
            width = max(self._attention.shape[1], attention.shape[1])
            self._attention = torch.cat([_widened(self._attention, width, 1), _widened(attention, width, 1)])
            self._layers = [
                (_joined(old[0], new[0], width), _joined(old[1], new[1], width))
                for old, new in zip(self._layers, layers, strict=True)
            ]
            self._following = torch.cat([self._following, following])
        for number, sequence in enumerate(sequences):
            sequence.prompt_tokens = int(attention[number].sum())
        self.rows += sequences
        self._last += [0] * len(sequences)
        new = range(len(self.rows) - len(sequences), len(self.rows))
        self._take(new, self.lmm.logits(hidden.last_hidden_state[:, -1]))
        return self._leave()

    @torch.no_grad()
    def step(self) -> list[Running]:
        """One more token for every row; returns the rows that got it, the finished ones have left the batch."""
        if not self.rows:
            return []
        device = self._attention.device
        self._attention = pad(self._attention, (0, 1), value=1)
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        hidden = self.lmm.decoder(
            inputs_embeds=self.lmm.words(torch.tensor(self._last, device=device)[:, None]),
            attention_mask=self._attention,
            position_ids=self.lmm.family.positions(self._following[:, None]),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        self._layers = [(layer.keys, layer.values) for layer in cache.layers]
        self._following = self._following + 1
        rows = list(self.rows)
        self._take(range(len(rows)), self.lmm.logits(hidden[:, -1]))
        self._leave()
        return rows

    def drop(self, keys: set[Any]) -> None:
        """Take out sequences that nobody waits for any more."""
        self._keep([number for number, row in enumerate(self.rows) if row.key not in keys])

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
            row.text = self._decode(row.tokens)

    def _decode(self, tokens: list[int]) -> str:
        return self.lmm.conversation.decode(tokens)

    def _leave(self) -> list[Running]:
        before = list(self.rows)
        self._keep([number for number, row in enumerate(self.rows) if row.finish is None])
        return before

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in rows]
        self._last = [self._last[number] for number in rows]
        if not rows:
            self._layers = []
            return
        index = torch.tensor(rows, device=self._attention.device)
        attention = self._attention[index]
        first = int(attention.any(0).float().argmax())  # columns before it are padding in every row that stays
        self._attention, self._following = attention[:, first:], self._following[index]
        self._layers = [(keys[index, :, first:], values[index, :, first:]) for keys, values in self._layers]

    def _generate_whole(self, routed: Routed, sequences: Sequence[Running]) -> list[Running]:
        for longest in sorted({sequence.longest for sequence in sequences}):
            mine = [number for number, sequence in enumerate(sequences) if sequence.longest == longest]
            texts = generate_answers(
                self.lmm, routed.examples, mine, routed.selected, self.bank, longest, len(mine), self.insertion
            )
            for number, text in texts.items():
                sequence = sequences[number]
                # The tokens themselves are not handed out: their number is that of the text's.
                sequence.tokens = self.lmm.tokenizer(text, add_special_tokens=False).input_ids[:longest]
                sequence.text = text
                sequence.finish = "length" if len(sequence.tokens) >= longest else "stop"
                sequence.prompt_tokens = len(routed.examples[number].prompt)
        return list(sequences)


def _widened(tensor: Tensor, width: int, dimension: int) -> Tensor:
    """The tensor with zeros in front in one dimension, so that it is `width` long there."""
    missing = width - tensor.shape[dimension]
    return pad(tensor, (*(0, 0) * (tensor.dim() - 1 - dimension), missing, 0)) if missing else tensor


def _joined(old: Tensor, new: Tensor, width: int) -> Tensor:
    return torch.cat([_widened(old, width, 2), _widened(new, width, 2)])
