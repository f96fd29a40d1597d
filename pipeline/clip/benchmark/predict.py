"""Predictions for many images; text features are computed once where they do not depend on the image."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pipeline.clip.learning.model import PromptedCLIP


@torch.no_grad()
def predictions(module: PromptedCLIP, batches: Iterable[Tensor], features: Iterable[Tensor] = ()) -> Tensor:
    """The most likely class [N] of each image, on the CPU: first of `batches`, then of `features`.

    Args:
        module: the classifier.
        batches: pixels [B, 3, H, W] each.
        features: image features [B, J] each, for methods without image prompts.
    """
    kept = None if module.learner.per_image else module.text_features()
    found = [module.logits(pixels, text_features=kept).argmax(dim=1).cpu() for pixels in batches]
    found += [module.logits(None, images, kept).argmax(dim=1).cpu() for images in features]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
