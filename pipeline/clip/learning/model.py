"""The module that is trained: a frozen backbone, a method's trainables, and the texts of the current classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipeline.clip.learning.descriptions import Descriptions
from pipeline.clip.methods.base import PromptLearner, Prompts
from pipeline.clip.methods.regulariser import Features, Regulariser
from pipeline.clip.recipe_descriptions import Mode
from pipeline.clip.towers.backbone import Backbone, normalised
from pipeline.clip.towers.encode import encode_texts
from pipeline.clip.towers.text import Words
from pipeline.errors import UserError
from pipeline.training.normaliser import Normaliser


@dataclass(frozen=True)
class ImageBatch:
    """Images with their labels; a weight of 0 marks a sample that only fills a batch.

    `pixel_values` [B, 3, H, W], `labels` [B], `weights` [B] (None: all 1). `image_features` [B, J] replace
    `pixel_values` for methods without image prompts.
    """

    pixel_values: Tensor | None
    labels: Tensor
    weights: Tensor | None = None
    image_features: Tensor | None = None
    ids: tuple[str, ...] = ()

    def to(self, device: torch.device) -> ImageBatch:
        """The same batch on another device."""
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in self._named.items()}
        return replace(self, **moved)

    def pin_memory(self) -> ImageBatch:
        """The batch in pinned memory, from which a GPU copies while it computes; torch's loader calls this."""
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in self._named.items()}
        return replace(self, **pinned)

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        return list(self._named.values())

    @property
    def _named(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.__dict__.items() if isinstance(value, Tensor)}

    def counts(self) -> tuple[float, float]:
        """The total weight of the samples, twice: the training loop sums answer units and samples, here the same."""
        weight = float(len(self.labels) if self.weights is None else self.weights.sum())
        return weight, weight


class PromptedCLIP(nn.Module):
    """A classifier over named classes; `learner` holds the only parameters with gradients.

    Args:
        backbone: the frozen CLIP or SigLIP.
        learner: the method's trainables.
        words: the tokenizer.
        names: the class names.
        regularisers: further terms of the loss.
        text_chunk: texts per pass of the text tower; None: all at once.
        descriptions: give a class several texts; None: one with its name.

    Raises:
        UserError: the learner has class-specific contexts for another number of classes, or regularisers are given for
            a method whose text features depend on the image.
    """

    def __init__(
        self,
        backbone: Backbone,
        learner: PromptLearner,
        words: Words,
        names: Sequence[str],
        regularisers: Sequence[Regulariser] = (),
        text_chunk: int | None = None,
        descriptions: Descriptions | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.learner = backbone, learner
        self.words, self.text_chunk, self.descriptions = words, text_chunk, descriptions
        self.regularisers = tuple(regularisers)
        if self.regularisers and learner.per_image:
            raise UserError(
                f"The method {learner.name} has text features of its own for each image, which the regularisers cannot "
                "compare with the frozen ones. Leave out the regularisers, or choose another method."
            )
        self.set_classes(names)

    counts_tokens = False  # progress is counted in images

    @property
    def term_names(self) -> tuple[str, ...]:
        """The names of the loss terms, in the order of `forward`'s."""
        return ("cross_entropy", *(name for regulariser in self.regularisers for name in regulariser.names))

    def set_classes(self, names: Sequence[str], frozen: Backbone | None = None) -> None:
        """Set the classes; the trainables stay.

        `frozen` is a copy of the backbone on which regularisers compute their frozen features, since this module's own
        may be sharded.
        """
        described = names if self.descriptions is None else self.descriptions.described(names)
        expected, what = self.learner.classes, "classes" if self.descriptions is None else "descriptions"
        if expected is not None and expected != len(described):
            raise UserError(
                f"The method {self.learner.name} learned a context for each of {expected} {what}, but the class list "
                f"has {len(described)}. Give the classes it was trained on, or train with a shared context."
            )
        self.names = tuple(names)
        self.texts = self.learner.texts(self.words, described)
        self._averaging = None if self.descriptions is None else self.descriptions.averaging(names)
        for regulariser in self.regularisers:
            regulariser.start(frozen or self.backbone, self.words, names)

    def image_features(self, pixel_values: Tensor, prompts: Prompts | None = None) -> Tensor:
        """Image features [B, J], not normalised."""
        if not self.learner.changes_images:
            with torch.no_grad():
                return self.backbone.image(pixel_values, self.learner.schedule, {})
        prompts = prompts or self.learner()
        return self.backbone.image(pixel_values, self.learner.schedule, prompts.vision)

    def text_features(self, prompts: Prompts | None = None) -> Tensor:
        """Text features [K, J] of the classes, or [B, K, J] for prompts made from B images; not normalised.

        Where logits of descriptions are averaged, features [R, J] of all R descriptions; see `class_features`.
        In evaluation compute them once and pass them to `logits`, except for methods whose prompts depend on the image.
        """
        prompts = prompts or self.learner()
        self.texts = self.texts.to(self.backbone.scale.device)
        found = encode_texts(self.backbone, self.texts, self.learner.schedule, prompts.text, self.text_chunk)
        return self._by_class(found) if self._averages("features") else found

    def class_features(self, texts: Tensor) -> Tensor:
        """A unit text feature [K, J] for each class from `text_features` that do not depend on the image.

        Where logits are averaged, it is the mean of the descriptions' unit features, brought to unit length.
        """
        return normalised(self._by_class(normalised(texts))) if self._averages("logits") else normalised(texts)

    def _averages(self, what: Mode) -> bool:
        return self.descriptions is not None and self.descriptions.mode == what

    def _by_class(self, values: Tensor) -> Tensor:
        """Means [K, ...] over the descriptions of each class of values [R, ...]."""
        assert self._averaging is not None
        self._averaging = self._averaging.to(values.device)
        return self._averaging.to(values.dtype) @ values

    def _scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """Class logits [B, K] of features."""
        found = self.backbone.logits(images, texts)
        return self._by_class(found.T).T if self._averages("logits") else found

    def logits(
        self, pixel_values: Tensor | None, image_features: Tensor | None = None, text_features: Tensor | None = None
    ) -> Tensor:
        """Class logits [B, K] of `pixel_values` [B, 3, H, W]; features that are passed are not computed."""
        return self._scores(*self._features(pixel_values, image_features, text_features))

    def _features(
        self, pixel_values: Tensor | None, images: Tensor | None = None, texts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        needs_prompts = (images is None and self.learner.changes_images) or texts is None
        prompts = self.learner() if needs_prompts and not self.learner.per_image else None
        if images is None:
            assert pixel_values is not None, "either pixel values or image features"
            images = self.image_features(pixel_values, prompts)
        if texts is None:
            texts = self.text_features(prompts if prompts is not None else self.learner(images))
        return images, texts

    def total(self, terms: Sequence[float]) -> float:
        """The total loss from its terms, which are already weighted."""
        return sum(terms)

    def forward(self, batch: ImageBatch, normaliser: Normaliser | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, and its detached terms by name.

        Sums over this batch are divided by the normaliser's samples, which is the total weight of the optimizer step
        over all ranks (None: by the total weight of this batch).
        """
        images, texts = self._features(batch.pixel_values, batch.image_features)
        logits = self._scores(images, texts)
        weights = torch.ones_like(logits[:, 0]) if batch.weights is None else batch.weights
        share = weights / (weights.sum() if normaliser is None else normaliser.samples)
        labels = batch.labels.to(logits.device)
        terms = {"cross_entropy": (cross_entropy(logits, labels, reduction="none") * share).sum()}
        features = Features(images, texts, logits, share, batch.pixel_values)
        for regulariser in self.regularisers:
            terms.update(regulariser.terms(self.backbone, features))
        loss = torch.stack(list(terms.values())).sum() * (1.0 if normaliser is None else normaliser.scale)
        return loss, {name: term.detach() for name, term in terms.items()}
