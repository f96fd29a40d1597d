"""The module that DeepSpeed wraps: a frozen model and what a stage trains on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.backbones.gated import gates_kept_once
from pipeline.backbones.lmm import LMM
from pipeline.backbones.prefix_cache import hidden_after_prefix
from pipeline.backbones.recompute import recomputing
from pipeline.data.collate import Batch
from pipeline.prompts.insertion import insert_gaps, insert_prompts, insertion_place
from pipeline.prompts.learner import Learner
from pipeline.prompts.two_passes import cut_behind_images
from pipeline.training.normaliser import Normaliser


@dataclass(frozen=True)
class Answers:
    """Where the tokens of the answers are predicted, and what they are; shorter answers are filled up."""

    at: Tensor  # [B, A] positions, each before its token
    targets: Tensor  # [B, A], -100 where there is no token


def answers_of(labels: Tensor) -> Answers:
    """The answers of labels [B, N]."""
    targets = labels[:, 1:]
    width = max(int((targets != -100).sum(1).max()), 1)
    at = (targets == -100).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
    return Answers(at, targets.gather(1, at))


class LearnerOnLMM(nn.Module):
    """What a stage trains, on a frozen multimodal model: its forward computes the whole loss.

    Nothing but the `learner` has gradients, besides the model's projector where the learner has that among its parts.
    """

    counts_tokens = True

    def __init__(self, lmm: LMM, learner: Learner, checkpointing: str = "none") -> None:
        super().__init__()
        self.lmm, self.learner, self.checkpointing = lmm, learner, checkpointing

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The module's parameters first, then the frozen model's, then those of the other parts.

        Without ZeRO, DeepSpeed adds the squares of the gradients in this order for their norm: another one would clip
        by a number with other last bits, and a run of an earlier version would not go on bit for bit.
        """
        found = dict(super().named_parameters(*args, **kwargs))
        first = {name for name in found if "learner.parts.module." in name}
        yield from ((name, found[name]) for name in found if name in first)
        yield from ((name, found[name]) for name in found if name not in first)

    @property
    def in_two_passes(self) -> bool:
        """Whether what stands before the sets is computed by itself, without gradients."""
        return self.learner.insertion == "after_image"

    @property
    def term_names(self) -> tuple[str, ...]:
        """The loss of the answers and the learner's further terms."""
        return ("loss_lm", *self.learner.term_names)

    def total(self, terms: Sequence[float]) -> float:
        """The loss that is minimised, from its terms in the order of `term_names`."""
        loss, rest = terms[0], list(terms[1:])
        for term in self.learner.terms:
            count = len(term.names)
            loss, rest = loss + term.weight * sum(rest[:count]), rest[count:]
        return loss

    def forward(self, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, and its terms by name: shares of the means over the optimizer step."""

        def attached() -> AbstractContextManager[None]:
            return self.learner.attached(self.lmm, batch.selection)

        layers = recomputing(self.lmm, self.checkpointing, again_in=attached)
        with layers, gates_kept_once(self.lmm, self.checkpointing), attached():
            hidden, answers = self._in_two_passes(batch) if self.in_two_passes else self._in_one_pass(batch)
        language = self._language_loss(hidden, answers.targets, batch.weights) / max(normaliser.tokens, 1.0)
        loss, terms = language, {"loss_lm": language.detach()}
        for term in self.learner.terms:
            losses = term.losses(self.learner.parts, batch, normaliser)
            loss = loss + term.weight * sum(losses)
            terms |= {name: value.detach() for name, value in zip(term.names, losses, strict=True)}
        return loss * normaliser.scale, terms

    def _in_one_pass(self, batch: Batch) -> tuple[Tensor, Answers]:
        """Last hidden states [B, A, D] at the answers of the samples with their modules."""
        embeddings = self.lmm.embed(batch.input_ids, batch.images, batch.has_image)
        attention, labels = batch.attention, batch.labels
        places, rows = self.lmm.image_places(batch.input_ids), self.learner.rows(batch.selection)
        if rows is not None:
            vectors, valid = rows
            spans = self.lmm.image_spans(places)
            place = insertion_place(attention, spans, self.learner.insertion or "after_bos")
            if self.lmm.family.needs_image_mask:
                places = insert_gaps(places, attention, valid, place)
            embeddings, attention, moved = insert_prompts(embeddings, attention, vectors, valid, labels, place=place)
            assert moved is not None
            labels = moved
        answers = answers_of(labels)
        return self.lmm.hidden(embeddings, attention, places, batch.images, answers.at), answers

    def _in_two_passes(self, batch: Batch) -> tuple[Tensor, Answers]:
        """The same of what stands behind the image: the sets, the question and the answer."""
        cut, rows = cut_behind_images(self.lmm, batch), self.learner.rows(batch.selection)
        assert rows is not None
        foremost = torch.zeros_like(cut.groups)
        embeddings, attention, labels = insert_prompts(cut.embeddings, cut.attention, *rows, cut.labels, place=foremost)
        assert labels is not None
        answers = answers_of(labels)
        return hidden_after_prefix(self.lmm, cut.prefix, cut.groups, embeddings, attention, answers.at), answers

    def _language_loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Summed cross-entropy of the answer tokens; only their positions go through the LM head."""
        sample, position = (targets != -100).nonzero(as_tuple=True)
        weight = weights[sample]
        if not len(sample):  # the head runs on every rank, whatever the batch holds (docs/design.md 3.2)
            sample = position = torch.zeros(1, dtype=torch.long, device=targets.device)
            weight = torch.zeros(1, device=targets.device)
        logits = self.lmm.logits(hidden[sample, position])
        losses = cross_entropy(logits, targets[sample, position].clamp(min=0), reduction="none")
        return (losses * weight).sum()
