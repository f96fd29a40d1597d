"""A router with two means per task: of its image keys and of its text keys (HiDe-LLaVA, DISCO)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.data.keys import in_parts
from pipeline.prompts.routers.base import Router, State, States
from pipeline.prompts.routers.mean import SAMPLES_AT_ONCE, KeyWeights

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys

IMAGE, TEXT = "image_mean", "text_mean"  # unit vectors [K] of a task's state; zeros where no sample has an image


class TwoMeans(Router):
    """The cosine of the image key to the mean image key of a task, and of the text key to its mean text key.

    `image_weight` of the score is the image's. A sample or a task without images is compared by the text alone.
    """

    Options = KeyWeights
    names = (IMAGE, TEXT)

    def observe(self, keys: AnyKeys) -> State:
        image = torch.zeros(keys.image.shape[1])
        text = torch.zeros(keys.text.shape[1])
        for part in in_parts(keys, SAMPLES_AT_ONCE):
            flags = part.has_image.float()[:, None]
            image = image + (normalize(part.image.float(), dim=-1) * flags).sum(0)
            text = text + normalize(part.text.float(), dim=-1).sum(0)
        return {IMAGE: normalize(image, dim=-1), TEXT: normalize(text, dim=-1)}

    def scores(self, keys: AnyKeys, states: States) -> Tensor:
        if not len(states):
            return torch.zeros(len(keys.text), 0)
        images, texts = states.stacked(IMAGE).float(), states.stacked(TEXT).float()  # [T, K]
        pictured = images.square().sum(1) > 0
        found = []
        for part in in_parts(keys, SAMPLES_AT_ONCE):
            weight = self.options.image_weight * (part.has_image.bool()[:, None] & pictured).float()  # [N, T]
            image = normalize(part.image.float(), dim=-1) @ images.T
            found.append(weight * image + (1 - weight) * (normalize(part.text.float(), dim=-1) @ texts.T))
        return torch.cat(found) if found else torch.zeros(0, len(states))

    def views(self) -> dict[str, Router]:
        either = {"image_only": 1.0, "text_only": 0.0}
        alone = {name: type(self)(KeyWeights(image_weight=weight)) for name, weight in either.items()}
        return {"accuracy": self, **alone}
