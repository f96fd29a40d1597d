"""Encode texts with the text tower: per class, or per image and class, at once or in recomputed chunks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.clip.towers.backbone import Backbone
from pipeline.clip.towers.inject import Additions
from pipeline.clip.towers.schedule import PromptSchedule
from pipeline.clip.towers.text import ClassTexts

# Texts per pass without gradients. Larger passes only need more memory; CoCoOp has images x classes texts.
AT_ONCE = 2048


def encode_texts(
    backbone: Backbone,
    texts: ClassTexts,
    schedule: PromptSchedule,
    added: Additions,
    chunk: int | None = None,
) -> Tensor:
    """Text features [K, J] of the classes, or [B, K, J] when the context is per image [B, 1, n, D]; not normalised.

    Args:
        backbone: the frozen model.
        texts: the texts of the K classes.
        schedule: the operations of each block.
        added: prompts by block.
        chunk: sequences per pass of the tower; None: all. With gradients a chunk's activations are recomputed in the
            backward pass, so memory does not grow with the number of classes. The result is that of one pass.
    """
    classes = len(texts.ids)
    context = added.get(0)
    images = len(context) if isinstance(context, Tensor) and context.dim() == 4 else None
    features, learning = [], torch.is_grad_enabled()
    sequences = torch.arange(classes * (images or 1), device=texts.ids.device)
    together = chunk or len(sequences)
    for numbers in sequences.split(together if learning else min(together, AT_ONCE)):
        if chunk and learning:
            part = checkpoint(
                _encode, backbone, texts, schedule, added, numbers, use_reentrant=False, preserve_rng_state=False
            )
        else:
            part = _encode(backbone, texts, schedule, added, numbers)
        features.append(part)
    result = torch.cat(features)
    return result if images is None else result.view(images, classes, -1)


def _encode(
    backbone: Backbone, texts: ClassTexts, schedule: PromptSchedule, added: Additions, numbers: Tensor
) -> Tensor:
    """Features [R, J] of the sequences `numbers` [R]; number image * K + class is a class's text for an image."""
    classes = numbers % len(texts.ids)
    fresh = dict(added)
    context = fresh.get(0)
    if isinstance(context, Tensor) and context.dim() > 2:
        fresh[0] = context[classes] if context.dim() == 3 else context[numbers // len(texts.ids), 0]
    averaged = None if texts.averaged is None else texts.averaged[:, classes]
    return backbone.text(texts.ids[classes], texts.rows[classes], schedule, fresh, averaged)
