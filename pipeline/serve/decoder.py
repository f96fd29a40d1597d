"""Continuous batching: questions with different prompt sets are decoded together, and join and leave at every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pipeline.adapter.answering import Answerer, Routed
from pipeline.backbones.decoding import GreedyDecoder, Prompts, Row
from pipeline.data.collate import collate_prompts
from pipeline.prompts.embedding import embed_with_sets
from pipeline.prompts.parts.base import attachment
from pipeline.prompts.parts.input_rows import PROMPT
from pipeline.serve.memory import Extent


@dataclass
class Running(Row):
    """One answer in progress, and its text up to the first stop text in it."""

    key: Any  # the request, for rows of the worker
    stops: Sequence[str] = ()
    text: str = field(default="", kw_only=True)

    @property
    def extent(self) -> Extent:
        """Tokens in the cache, and the most that may follow."""
        return Extent(self.prompt_tokens + len(self.tokens), self.longest - len(self.tokens))


class RunningBatch(GreedyDecoder[Running]):
    """The running batch: a `GreedyDecoder` whose rows have texts and stop texts."""

    def __init__(self, answerer: Answerer) -> None:
        lmm, entry = answerer.lmm, answerer.entry
        tensors = {name: value.to(lmm.model.device, lmm.dtype) for name, value in answerer.pool.tensors.items()}
        super().__init__(lmm, attachment(lmm, entry, tensors))
        self.insertion, self.sets = entry.insertion or "after_bos", tensors.get(PROMPT, torch.zeros(0))

    @torch.no_grad()
    def begin(self, routed: Routed, answers: Sequence[Running]) -> list[Running]:
        """Add the answers to routed questions and decode their first tokens; returns them."""
        batch = collate_prompts(routed.examples, range(len(answers)), routed.selection).to(self.lmm.model.device)
        embeddings, attention, places = embed_with_sets(self.lmm, batch, self.sets, self.insertion)
        prompts = Prompts(embeddings, attention, places, batch.images, selection=batch.selection)
        return self._read_texts(self.join(prompts, answers))

    def step(self) -> list[Running]:
        """Decode one token for every answer; returns those answers, of which finished ones have left the batch."""
        return self._read_texts(super().step())

    def _read_texts(self, answers: list[Running]) -> list[Running]:
        """Update the texts; answers with a stop text are finished and leave the batch."""
        for answer in answers:
            answer.text, stopped = before_stops(self.lmm.conversation.decode(answer.tokens), answer.stops)
            if stopped:
                answer.finish = "stop"
        self.leave()
        return answers


def before_stops(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """(the text before the first stop text in it, whether there is one)."""
    found = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)
