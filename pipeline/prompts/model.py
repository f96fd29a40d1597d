"""The module that DeepSpeed wraps: a frozen model, one prompt set, one head; its forward computes the whole loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from pipeline.backbones.gated import gates_kept_once
from pipeline.backbones.lmm import LMM
from pipeline.backbones.prefix_cache import hidden_after_prefix
from pipeline.backbones.recompute import recomputing
from pipeline.data.collate import Batch
from pipeline.data.selection import NO_SET
from pipeline.prompts.heads import ProjectionHead
from pipeline.prompts.insertion import gather_sets, insert_gaps, insert_prompts, insertion_place
from pipeline.prompts.routers.mean import prototype_term_weights
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


class PromptedLMM(nn.Module):
    """Trainables of the current stage on a frozen multimodal model (docs/design.md 4).

    `prompt` [L, D] and `head` are the only parameters with gradients, besides the model's projector where the recipe
    trains it. The earlier sets are `bank` [t-1, L, D], a plain tensor that no optimizer can reach.
    """

    counts_tokens = True
    term_names: tuple[str, ...] = ("loss_lm", "loss_image", "loss_text")

    def __init__(
        self,
        lmm: LMM,
        prompt_length: int,
        key_width: int,
        insertion: str = "after_bos",
        checkpointing: str = "none",
    ) -> None:
        super().__init__()
        self.lmm = lmm
        self.checkpointing = checkpointing
        self.insertion = insertion
        if self.in_two_passes:
            lmm.require_two_passes()
        # Trainables take the model's precision; DeepSpeed keeps float32 masters of them (docs/design.md 7.2).
        self.prompt = nn.Parameter(torch.zeros(prompt_length, lmm.width, dtype=lmm.dtype))
        self.head = ProjectionHead(lmm.width, key_width, dtype=lmm.dtype)
        self.bank = torch.zeros(0, prompt_length, lmm.width)
        self.prototype_weight = 0.0

    @property
    def in_two_passes(self) -> bool:
        """Whether what stands before the sets is computed by itself, without gradients."""
        return self.insertion == "after_image"

    def start_stage(self, bank: Tensor, prototype_weight: float) -> None:
        """Set what is constant during a stage."""
        # No copy where it is there already: sets of a pool never change in place, and 1,024 of them are large.
        self.bank = bank.detach().to(device=self.prompt.device, dtype=self.lmm.dtype)
        self.prototype_weight = prototype_weight

    def prompt_vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sets of each sample [B, m*L, D] and their validity: the selected earlier ones, then the current one."""
        chosen = batch.selected
        # Only the sets of this batch are joined with the current one: the cost does not grow with the pool.
        used = self.bank[chosen.clamp(min=0).flatten()] if chosen.numel() else self.bank[:0]
        sets = torch.cat([used, self.prompt[None]])
        numbers = torch.arange(chosen.numel(), device=chosen.device).reshape(chosen.shape)
        own = chosen.new_full((len(chosen), 1), chosen.numel())
        return gather_sets(sets, torch.cat([numbers.masked_fill(chosen == NO_SET, NO_SET), own], dim=1))

    def total(self, terms: Sequence[float]) -> float:
        """The loss that is minimised, from its terms in the order of `term_names`."""
        return terms[0] + self.prototype_weight * (terms[1] + terms[2])

    def forward(self, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, and its terms by name: shares of the language, image and text means."""
        with recomputing(self.lmm, self.checkpointing), gates_kept_once(self.lmm, self.checkpointing):
            hidden, answers = self._in_two_passes(batch) if self.in_two_passes else self._in_one_pass(batch)
        language = self._language_loss(hidden, answers.targets, batch.weights) / max(normaliser.tokens, 1.0)
        image, text = self._prototype_losses(batch)
        image, text = image / max(normaliser.samples, 1.0), text / max(normaliser.samples, 1.0)
        loss = (language + self.prototype_weight * (image + text)) * normaliser.scale
        terms = zip(self.term_names, (language, image, text), strict=True)
        return loss, {name: term.detach() for name, term in terms}

    def _in_one_pass(self, batch: Batch) -> tuple[Tensor, Answers]:
        """Last hidden states [B, A, D] at the answers of the samples with their sets."""
        embeddings = self.lmm.embed(batch.input_ids, batch.images, batch.has_image)
        vectors, valid = self.prompt_vectors(batch)
        places = self.lmm.image_places(batch.input_ids)
        place = insertion_place(batch.attention, self.lmm.image_spans(places), self.insertion)
        embeddings, attention, labels = insert_prompts(
            embeddings, batch.attention, vectors, valid, batch.labels, place=place
        )
        assert labels is not None
        if self.lmm.family.needs_image_mask:
            places = insert_gaps(places, batch.attention, valid, place)
        answers = answers_of(labels)
        return self.lmm.hidden(embeddings, attention, places, batch.images, answers.at), answers

    def _in_two_passes(self, batch: Batch) -> tuple[Tensor, Answers]:
        """The same of what stands behind the image: the sets, the question and the answer."""
        cut = cut_behind_images(self.lmm, batch)
        vectors, valid = self.prompt_vectors(batch)
        foremost = torch.zeros_like(cut.groups)
        embeddings, attention, labels = insert_prompts(
            cut.embeddings, cut.attention, vectors, valid, cut.labels, place=foremost
        )
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

    def _prototype_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed 1 - cos(key, prototype) for both keys (docs/design.md 4.8)."""
        prototype = self.head(self.prompt).float()[None]
        image_weight, text_weight = prototype_term_weights(batch.has_image)
        image = 1.0 - cosine_similarity(batch.image_key, prototype, dim=-1)
        text = 1.0 - cosine_similarity(batch.text_key, prototype, dim=-1)
        return (image * image_weight * batch.weights).sum(), (text * text_weight * batch.weights).sum()
