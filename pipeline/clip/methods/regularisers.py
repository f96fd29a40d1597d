"""Terms that penalise the distance to the frozen model: PromptSRC's and KgCoOp's (docs/design.md 5.9, 5.10)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, log_softmax

from pipeline.clip.methods.base import TEMPLATE
from pipeline.clip.methods.regulariser import Features, Regulariser
from pipeline.clip.templates import PROMPTSRC
from pipeline.clip.towers.backbone import Backbone, normalised
from pipeline.clip.towers.encode import encode_texts
from pipeline.clip.towers.schedule import schedule
from pipeline.clip.towers.text import Words, class_texts
from pipeline.errors import UserError


def frozen_text_features(
    backbone: Backbone, words: Words, names: Sequence[str], templates: Sequence[str], chunk: int = 256
) -> Tensor:
    """Text features [K, J] of the frozen model: the mean of unnormalised features over the templates, then normalised.

    Args:
        backbone: the frozen model.
        words: the tokenizer.
        names: the class names.
        templates: the text templates.
        chunk: texts per pass of the text tower.
    """
    blank = schedule([], [], backbone.sizes.blocks)
    total = torch.zeros(())
    with torch.no_grad():
        for template in templates:
            texts = class_texts(words, names, template).to(backbone.scale.device)
            total = total.to(backbone.scale.device) + encode_texts(backbone, texts, blank, {}, chunk)
        return normalised(total / len(templates))


class Consistency(Regulariser):
    """PromptSRC's terms (docs/design.md 5.9).

    Text and image term: the mean absolute difference of normalised features to the frozen model's. Logit term:
    KL(frozen || learned) of the predictions, summed and divided by the number of logits.

    Args:
        text_weight: weight of the text term.
        image_weight: weight of the image term.
        logit_weight: weight of the logit term.
        templates: templates of the frozen text features.
    """

    names = ("text_consistency", "image_consistency", "logit_consistency")

    def __init__(
        self,
        text_weight: float = 25.0,
        image_weight: float = 10.0,
        logit_weight: float = 1.0,
        templates: Sequence[str] = PROMPTSRC,
    ) -> None:
        if not templates:
            raise UserError("The frozen text features need at least one template; none was given. Name one.")
        self.text_weight, self.image_weight, self.logit_weight = text_weight, image_weight, logit_weight
        self.templates = tuple(templates)
        self._texts: Tensor | None = None

    def start(self, backbone: Backbone, words: Words, names: Sequence[str]) -> None:
        self._texts = frozen_text_features(backbone, words, names, self.templates)

    def terms(self, backbone: Backbone, features: Features) -> dict[str, Tensor]:
        assert self._texts is not None, "start comes before terms"
        if features.pixel_values is None:
            raise UserError(
                "The consistency terms compare with the frozen model's image features, which needs the images. Turn "
                "off cached image features, or the consistency terms."
            )
        self._texts = self._texts.to(features.images.device)
        with torch.no_grad():
            images = backbone.image(features.pixel_values, schedule([], [], backbone.sizes.blocks), {})
            logits = backbone.logits(images, self._texts)
        text = (normalised(features.texts) - self._texts).abs().mean()
        image = (normalised(features.images) - normalised(images)).abs().mean(dim=1)
        learned, frozen = log_softmax(features.logits, dim=1), log_softmax(logits, dim=1)
        divergence = (frozen.exp() * (frozen - learned)).mean(dim=1)
        return {
            "text_consistency": self.text_weight * text * features.share.sum(),
            "image_consistency": self.image_weight * (image * features.share).sum(),
            "logit_consistency": self.logit_weight * (divergence * features.share).sum(),
        }


class KnowledgeGuided(Regulariser):
    """KgCoOp's term: `weight` times the mean of 1 - cos(text feature, frozen feature of `template`)."""

    names = ("knowledge",)

    def __init__(self, weight: float = 8.0, template: str = TEMPLATE) -> None:
        self.weight, self.template = weight, template
        self._texts: Tensor | None = None

    def start(self, backbone: Backbone, words: Words, names: Sequence[str]) -> None:
        self._texts = frozen_text_features(backbone, words, names, [self.template])

    def terms(self, backbone: Backbone, features: Features) -> dict[str, Tensor]:
        assert self._texts is not None, "start comes before terms"
        self._texts = self._texts.to(features.texts.device)
        distance = 1.0 - cosine_similarity(features.texts, self._texts, dim=-1).mean()
        return {"knowledge": self.weight * distance * features.share.sum()}
