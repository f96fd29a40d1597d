"""The k most similar modules of each sample, with a gate against dissimilar ones (ModalPrompt)."""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config.base import Section
from pipeline.config.method import BOTH_BOUNDS
from pipeline.data.selection import NO_SET, Selection, without_gaps
from pipeline.prompts.rules.base import Rule


class TopKOptions(Section):
    """How many modules a sample gets, and how similar they have to be."""

    k: int = Field(3, ge=1, description="most modules of one sample, in training the current one among them")
    gate: float | None = Field(
        None, ge=0, description="only modules whose score is at least the best minus this; null: always k"
    )
    share: float | None = Field(
        None, gt=0, le=1, description="only modules whose probability is at least this share of the best one's"
    )

    @model_validator(mode="after")
    def _one_bound(self) -> TopKOptions:
        if self.gate is not None and self.share is not None:
            raise ValueError(BOTH_BOUNDS)
        return self


class TopK(Rule):
    """At most k modules: the most similar ones, and of these only those within `gate` of the best.

    With `share` only those whose task is at least that share as probable as the best one: as scores are then logarithms
    of probabilities, that is a gate of -log(share).
    """

    Options = TopKOptions
    compares = True

    @property
    def probable(self) -> bool:
        return self.options.share is not None

    @property
    def gate(self) -> float | None:
        """The largest difference to the best score with which a module is still selected."""
        return self.options.gate if self.options.share is None else -math.log(self.options.share)

    @property
    def needs_own(self) -> bool:
        return self.gate is not None

    def training(self, scores: Tensor, own: Tensor | None) -> Selection:
        return Selection(select_for_training(scores, self.options.k, self.gate, own))

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        return Selection(select_for_inference(scores, self.options.k, self.gate))

    def most(self, modules: int) -> int:
        return min(self.options.k, modules)


class Oracle(TopK):
    """What a task was trained with: its own module behind the k - 1 most similar earlier ones, the task being told.

    It is the upper bound of routing.
    """

    needs_task = True

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        numbers = torch.full((len(scores), self.most(scores.shape[1])), NO_SET, dtype=torch.long)
        used = 0
        for task in tasks.unique().tolist():
            mine = tasks == task
            part = scores[mine]
            earlier = select_for_training(part[:, :task], self.options.k, self.gate, reference=part[:, task])
            joined = without_gaps(torch.cat([earlier, earlier.new_full((len(earlier), 1), task)], dim=1))
            numbers[mine, : joined.shape[1]] = joined
            used = max(used, joined.shape[1])
        return Selection(numbers[:, :used])


def _best_in_ascending_order(scores: Tensor, count: int, allowed: Tensor) -> Tensor:
    """The `count` best allowed sets of each row, least similar first, filled up on the right. [B, T] -> [B, count]."""
    ranked = scores.masked_fill(~allowed, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :count]
    kept = torch.gather(allowed, 1, ranked)
    ranked = ranked.masked_fill(~kept, NO_SET).flip(-1)
    return without_gaps(ranked)  # after the flip the unused places stand on the left


def select_for_training(scores: Tensor, k: int, gate: float | None = None, reference: Tensor | None = None) -> Tensor:
    """The earlier sets that accompany the current one in training: at most k - 1 per sample.

    `scores` [B, t-1] similarities to the earlier prototypes -> [B, min(k-1, t-1)]. Without a gate the k - 1 most
    similar (all, in their natural order, when there are fewer than k - 1). With a gate a set is inserted only if its
    similarity is at least max(reference, best earlier) - gate, where `reference` [B] is the similarity to the current
    task's provisional prototype.
    """
    earlier = scores.shape[1]
    count = min(k - 1, earlier)
    if count <= 0:
        return torch.full((len(scores), 0), NO_SET, dtype=torch.long, device=scores.device)
    if gate is None:
        if earlier < k - 1:
            return torch.arange(earlier, device=scores.device).expand(len(scores), -1)
        return _best_in_ascending_order(scores, count, torch.ones_like(scores, dtype=torch.bool))
    best = scores.max(dim=-1).values
    if reference is not None:
        best = torch.maximum(best, reference.to(best))
    return _best_in_ascending_order(scores, count, scores >= (best - gate)[:, None])


def select_for_inference(scores: Tensor, k: int, gate: float | None = None) -> Tensor:
    """The sets inserted at inference: the k most similar of all, those within `gate` of the best.

    `scores` [B, T] -> [B, min(k, T)], least similar first.
    """
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if gate is not None:
        allowed = scores >= (scores.max(dim=-1, keepdim=True).values - gate)
    return _best_in_ascending_order(scores, min(k, scores.shape[1]), allowed)
