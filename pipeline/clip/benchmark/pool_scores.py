"""Features and predictions of a whole pool by a model, each rank its share, the same array on every rank."""

from __future__ import annotations

import torch

from pipeline.clip.active.pool import PoolView, Rows
from pipeline.clip.active.selection import Scored
from pipeline.clip.benchmark.evaluate import TestImages
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.ranks.world import sum_over_ranks


@torch.no_grad()
def score_pool(module: PromptedCLIP, images: TestImages, size: int, labelled: Rows) -> Scored:
    """What the classifier makes of rows 0 to `size` - 1 of the pool, in float32. All ranks call it.

    Features of the frozen image tower are those that `images` keeps.
    """
    world = images.world
    mine = list(range(world.rank, size, world.size))
    if module.learner.changes_images or not mine:
        found = [module.image_features(pixels).cpu() for pixels in images.pixel_batches(mine)]
        own = torch.cat(found) if found else torch.zeros(0, module.backbone.sizes.joint)
    else:
        own = images.features(module, mine)
    texts = None if module.learner.per_image else module.text_features()
    parts = [module.logits(None, part.to(world.device), texts).float().cpu() for part in own.split(images.batch)]
    features = torch.zeros(size, own.shape[1], device=world.device)
    logits = torch.zeros(size, len(module.names), device=world.device)
    if mine:
        # Every other rank adds zeros, so the sum is each rank's own number bit for bit.
        features[mine] = own.float().to(world.device)
        logits[mine] = torch.cat(parts).to(world.device)
    whole = PoolView.of(sum_over_ranks(features).cpu(), sum_over_ranks(logits).cpu(), labelled)
    shared = torch.zeros(logits.shape[1], features.shape[1]) if texts is None else module.class_features(texts.float())
    return Scored(whole, shared.cpu().double().numpy())
