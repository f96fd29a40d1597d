"""Accuracy of a classifier on the test images of a group of classes, split over the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.clip.images import Pixels
from pipeline.clip.model import PromptedCLIP
from pipeline.clip.predict import predictions
from pipeline.clip.prepared import ClassGroup
from pipeline.clip.scores import Counts
from pipeline.data.shards import IndexedShards
from pipeline.distributed import World, sum_over_ranks


class TestImages:
    """The test images of one dataset on this rank: every so-many-th row, their features kept once they are computed."""

    __test__ = False  # not a test, whatever its name begins with

    def __init__(self, shards: IndexedShards, pixels: Pixels, world: World, batch: int) -> None:
        self.shards, self.pixels, self.world, self.batch = shards, pixels, world, batch
        self._features: dict[int, Tensor] = {}  # row -> [J], of the frozen image tower

    def mine(self, group: ClassGroup) -> list[tuple[int, int]]:
        """(row, label) of this rank's share of a group."""
        return [(r, n) for r, n in zip(group.rows, group.labels, strict=True) if r % self.world.size == self.world.rank]

    def pixel_batches(self, rows: list[int]) -> Iterator[Tensor]:
        """Pixels [B, 3, H, W] of the rows in turn, on this rank's device."""
        for start in range(0, len(rows), self.batch):
            pictures = [self.shards[row].picture() for row in rows[start : start + self.batch]]
            batch = [self.pixels.plain(picture) for picture in pictures if picture is not None]
            yield torch.stack(batch).to(self.world.device)

    def features(self, module: PromptedCLIP, rows: list[int]) -> Tensor:
        """Features [N, J] of the frozen image tower, the same for every method that leaves images alone."""
        new = [row for row in rows if row not in self._features]
        with torch.no_grad():
            for start, pixels in zip(range(0, len(new), self.batch), self.pixel_batches(new), strict=True):
                found = module.image_features(pixels).cpu()
                self._features |= dict(zip(new[start : start + self.batch], found, strict=True))
        return torch.stack([self._features[row] for row in rows])


def evaluate_group(module: PromptedCLIP, images: TestImages, group: ClassGroup) -> Counts:
    """Right and all answers by class over all ranks; `module` classifies among the group's classes afterwards."""
    module.set_classes(group.names)
    mine = images.mine(group)
    rows, device = [row for row, _ in mine], images.world.device
    if module.learner.changes_images or not rows:
        found = predictions(module, images.pixel_batches(rows))
    else:
        kept = images.features(module, rows).to(device)
        found = predictions(module, [], features=kept.split(images.batch))
    counts = torch.zeros(2, len(group.names), device=device)
    for answer, (_, label) in zip(found.tolist(), mine, strict=True):
        counts[1, label] += 1
        counts[0, label] += answer == label
    right, total = sum_over_ranks(counts).round().long().tolist()
    return Counts(tuple(right), tuple(total))
