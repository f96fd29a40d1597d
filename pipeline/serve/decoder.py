"""Continuous batching: questions with different prompt sets are decoded together, and join and leave at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.adapter.answering import Answerer, Routed
from pipeline.backbones.decoding import GreedyDecoder, Prompts, Row
from pipeline.backbones.kv_cache import CacheSpace
from pipeline.data.collate import collate_prompts
from pipeline.prompts.answer_head import AnswerHeads
from pipeline.prompts.embedding import embed_with_modules
from pipeline.serve.memory import Extent


@dataclass
class Running(Row):
    """One answer in progress, and its text up to the first stop text in it.

    Where the text is not `followed` it is made when the answer ends, or with every token where there are stop texts.
    """

    key: Any  # the request, for rows of the worker
    stops: Sequence[str] = ()
    followed: bool = True
    text: str = field(default="", kw_only=True)

    @property
    def extent(self) -> Extent:
        """Tokens in the cache, and the most that may follow."""
        return Extent(self.prompt_tokens + len(self.tokens), self.longest - len(self.tokens))


class RunningBatch(GreedyDecoder[Running]):
    """The running batch: a `GreedyDecoder` whose rows have texts and stop texts."""

    def __init__(self, answerer: Answerer, slots: int = 0) -> None:
        """With memory for `slots` rows from the first one on, as far as `space` allows."""
        lmm, entry = answerer.lmm, answerer.entry
        learned = {**answerer.pool.tensors, **answerer.pool.common}
        tensors = {name: value.to(lmm.model.device, lmm.dtype) for name, value in learned.items()}
        super().__init__(lmm, entry.on(lmm, tensors), CacheSpace(slots, whole=True))
        self.entry, self.tensors, self.states = entry, tensors, answerer.pool.states

    @torch.no_grad()
    def begin(self, routed: Routed, answers: Sequence[Running]) -> list[Running]:
        """Add the answers to routed questions and decode their first tokens; returns them."""
        batch = collate_prompts(routed.examples, range(len(answers)), routed.selection).to(self.lmm.model.device)
        heads = AnswerHeads(self.states, routed.examples.data.keys, routed.selection)
        for answer, weigh in zip(answers, heads.weighing(range(len(answers))), strict=True):
            answer.weigh = weigh
        entry = self.entry
        found = embed_with_modules(self.lmm, batch, entry, self.tensors)
        inserted = found.inserted
        if entry.follows_rows and inserted is None:  # as rows of the batch may have some
            inserted = torch.zeros_like(found.attention)
        prompts = Prompts(
            found.vectors,
            found.attention,
            found.places,
            batch.images,
            selection=entry.chosen(self.tensors, batch),
            inserted=inserted if entry.follows_rows else None,
        )
        return self._read_texts(self.join(prompts, answers))

    def step(self) -> list[Running]:
        """Decode one token for every answer; returns those answers, of which finished ones have left the batch."""
        return self._read_texts(super().step())

    def _read_texts(self, answers: list[Running]) -> list[Running]:
        """Update the texts; answers with a stop text are finished and leave the batch."""
        for answer in answers:
            if not (answer.followed or answer.stops or answer.finish):
                continue
            answer.text, stopped = before_stops(self.lmm.conversation.decode(answer.tokens), answer.stops)
            if stopped:
                answer.finish = "stop"
        self.leave()
        return answers


def before_stops(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first stop text in it, whether there is one)."""
    found = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)
