"""Continuous batching: questions with different prompt sets decoded together, joining and leaving at every token."""

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
    """One answer in progress and its text so far, which ends before the first of `stops` that it holds."""

    key: Any  # the request, when the worker begins it
    stops: Sequence[str] = ()
    text: str = field(default="", kw_only=True)

    @property
    def extent(self) -> Extent:
        """Its tokens in the cache, and those that may follow."""
        return Extent(self.prompt_tokens + len(self.tokens), self.longest - len(self.tokens))


class RunningBatch(GreedyDecoder[Running]):
    """The answers being decoded; greedy, so that one does not depend on what it shares a batch with."""

    def __init__(self, answerer: Answerer) -> None:
        lmm, entry = answerer.lmm, answerer.entry
        tensors = {name: value.to(lmm.model.device, lmm.dtype) for name, value in answerer.pool.tensors.items()}
        super().__init__(lmm, attachment(lmm, entry, tensors))
        self.insertion, self.sets = entry.insertion or "after_bos", tensors.get(PROMPT, torch.zeros(0))

    @torch.no_grad()
    def begin(self, routed: Routed, answers: Sequence[Running]) -> list[Running]:
        """Begin the answers to routed questions; returns them, which have their first token."""
        batch = collate_prompts(routed.examples, range(len(answers)), routed.selection).to(self.lmm.model.device)
        embeddings, attention, places = embed_with_sets(self.lmm, batch, self.sets, self.insertion)
        prompts = Prompts(embeddings, attention, places, batch.images, selection=batch.selection)
        return self._read_texts(self.join(prompts, answers))

    def step(self) -> list[Running]:
        """One more token for every answer; returns those that got it, of which the finished ones have left."""
        return self._read_texts(super().step())

    def _read_texts(self, answers: list[Running]) -> list[Running]:
        """Bring the texts up to date; those that hold a stop are finished, and leave."""
        for answer in answers:
            answer.text, stopped = before_stops(self.lmm.conversation.decode(answer.tokens), answer.stops)
            if stopped:
                answer.finish = "stop"
        self.leave()
        return answers


def before_stops(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stops that it holds, and whether it holds one."""
    found = [place for place in map(text.find, stops) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)
