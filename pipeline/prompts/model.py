"""The module that DeepSpeed wraps: a frozen model and what a stage trains on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.backbones.compiled import Compiled
from pipeline.backbones.gated import gates_kept_once
from pipeline.backbones.lmm import LMM
from pipeline.backbones.packing import Fill, hidden_of_packed, pack
from pipeline.backbones.prefix_cache import hidden_after_prefix
from pipeline.backbones.recompute import recomputing
from pipeline.data.collate import Batch
from pipeline.data.selection import Selection
from pipeline.prompts.insertion import insert_gaps, insert_prompts, insertion_place, row_numbers
from pipeline.prompts.learner import Learner
from pipeline.prompts.terms import Step
from pipeline.prompts.two_passes import cut_behind_images
from pipeline.training.normaliser import Normaliser


@dataclass(frozen=True)
class Answers:
    """Where the tokens of the answers are predicted, and what they are; shorter answers are filled up."""

    at: Tensor  # [B, A] positions, each before its token
    targets: Tensor  # [B, A], -100 where there is no token


@dataclass(frozen=True)
class Said:
    """The n tokens of a batch's answers: the scores of all words there, the right ones, and the samples' weights."""

    logits: Tensor  # [n, V] float32
    targets: Tensor  # [n]
    weights: Tensor  # [n]


def answers_of(labels: Tensor) -> Answers:
    """The answers of labels [B, N]."""
    targets = labels[:, 1:]
    width = max(int((targets != -100).sum(1).max()), 1)
    at = (targets == -100).to(torch.int8).sort(dim=1, stable=True).indices[:, :width]
    return Answers(at, targets.gather(1, at))


@dataclass(frozen=True)
class _Read:
    """A batch as the decoder reads it."""

    decode: Callable[[], Tensor]  # runs it: last hidden states [B, A, D] at the answers
    answers: Answers
    inserted: Tensor | None  # see `Entry.attached`


class LearnerOnLMM(nn.Module):
    """What a stage trains, on a frozen multimodal model: its forward computes the whole loss.

    Nothing but the `learner` has gradients, besides the model's projector where the learner has that among its parts.
    """

    counts_tokens = True

    def __init__(
        self,
        lmm: LMM,
        learner: Learner,
        checkpointing: str = "none",
        compiled: Compiled | None = None,
        packing: bool = False,
    ) -> None:
        """`compiled`: the layers that run compiled; `packing`: short samples share rows of the decoder's batch."""
        super().__init__()
        self.lmm, self.learner, self.checkpointing = lmm, learner, checkpointing
        self.compiled, self.packing, self.fill = compiled, packing, Fill()

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
        said = self.said(batch)
        losses = cross_entropy(said.logits, said.targets, reduction="none")
        language = (losses * said.weights).sum() / max(normaliser.tokens, 1.0)
        loss, terms = language, {"loss_lm": language.detach()}
        learner = self.learner
        step = Step(
            learner.parts, learner.bank, batch, normaliser, said.logits, said.weights, lambda: self._said_before(batch)
        )
        for term in self.learner.terms:
            further = term.losses(step)
            loss = loss + term.weight * sum(further)
            terms |= {name: value.detach() for name, value in zip(term.names, further, strict=True)}
        return loss * normaliser.scale, terms

    def unlikeliness(self, batch: Batch) -> Tensor:
        """The negative log-likelihood of a batch's answers, without further terms."""
        said = self.said(batch)
        return (cross_entropy(said.logits, said.targets, reduction="none") * said.weights).sum()

    def said(self, batch: Batch) -> Said:
        """What the model with its modules says at the answers' tokens."""
        if self.compiled is None:
            return self._computed(batch)
        with self.compiled.active():
            return self._computed(batch)

    def _computed(self, batch: Batch) -> Said:
        # One object, by which modules know that a layer is computed again for this batch.
        selection = self.learner.chosen(batch)
        with self.learner.attached(self.lmm, selection) if self.learner.updates_inputs else nullcontext():
            read = self._in_two_passes(batch) if self.in_two_passes else self._in_one_pass(batch)

        def attached() -> AbstractContextManager[None]:
            return self.learner.attached(self.lmm, selection, read.inserted)

        layers = recomputing(self.lmm, self.checkpointing, again_in=attached)
        # Compiled layers need no help: what a product can be recomputed from is the compiler's choice.
        compiled = () if self.compiled is None else self.compiled.layers
        with layers, gates_kept_once(self.lmm, self.checkpointing, compiled), attached():
            hidden = read.decode()
        return self._at_tokens(hidden, read.answers.targets, batch.weights, selection)

    @torch.no_grad()
    def _said_before(self, batch: Batch) -> Tensor | None:
        """The logits [n, V] at the same tokens with what the stage before left alone; None in the first stage."""
        if not self.learner.previous:
            return None
        with self.learner.as_before():
            return self.said(batch).logits

    def _in_one_pass(self, batch: Batch) -> _Read:
        """What the decoder reads of the samples with their modules, and at which positions their answers are."""
        lmm = self.lmm
        embeddings = lmm.embed(batch.input_ids, batch.images, batch.has_image)
        attention, labels, inserted = batch.attention, batch.labels, None
        places, rows = lmm.image_places(batch.input_ids), self.learner.rows(batch)
        if rows is not None:
            vectors, valid = rows
            spans = lmm.image_spans(places)
            place = insertion_place(attention, spans, self.learner.insertion or "after_bos")
            if lmm.family.needs_image_mask:
                places = insert_gaps(places, attention, valid, place)
            if self.learner.follows_rows:
                inserted = row_numbers(attention, valid, place)
            embeddings, attention, moved = insert_prompts(embeddings, attention, vectors, valid, labels, place=place)
            assert moved is not None
            labels = moved
        answers, hidden = answers_of(labels), lmm.hidden
        if self.packing:
            packed = pack(lmm, attention)
            packed.count(self.fill)
            if packed.saves:
                hidden = partial(hidden_of_packed, packed, lmm)
        decode = partial(hidden, embeddings, attention, places, batch.images, answers.at)
        return _Read(decode, answers, inserted)

    def _in_two_passes(self, batch: Batch) -> _Read:
        """The same of what stands behind the image: the sets, the question and the answer."""
        cut, rows = cut_behind_images(self.lmm, batch), self.learner.rows(batch)
        assert rows is not None
        foremost = torch.zeros_like(cut.groups)
        inserted = cut.behind_prefix(row_numbers(cut.attention, rows[1], foremost))
        embeddings, attention, labels = insert_prompts(cut.embeddings, cut.attention, *rows, cut.labels, place=foremost)
        assert labels is not None
        answers = answers_of(labels)
        decode = partial(hidden_after_prefix, self.lmm, cut.prefix, cut.groups, embeddings, attention, answers.at)
        return _Read(decode, answers, inserted if self.learner.follows_rows else None)

    def _at_tokens(self, hidden: Tensor, targets: Tensor, weights: Tensor, selection: Selection) -> Said:
        """The logits of the answers' tokens; only their positions go through the LM head.

        Where modules update the LM head, each token is a row of its own there, with the modules of its sample.
        """
        sample, position = (targets != -100).nonzero(as_tuple=True)
        weight = weights[sample]
        if not len(sample):  # the head runs on every rank, whatever the batch holds (docs/design.md 3.2)
            sample = position = torch.zeros(1, dtype=torch.long, device=targets.device)
            weight = torch.zeros(1, device=targets.device)
        at = hidden[sample, position]  # [n, D]
        if self.learner.updates_output:
            with self.learner.attached(self.lmm, selection.tokens(sample, position)):
                logits = self.lmm.logits(at[:, None])[:, 0]
        else:
            logits = self.lmm.logits(at)
        return Said(logits, targets[sample, position].clamp(min=0), weight)
