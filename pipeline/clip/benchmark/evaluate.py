"""Accuracy of a classifier on the test images of a group of classes, split over the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.clip.benchmark.predict import predictions
from pipeline.clip.benchmark.scores import Counts
from pipeline.clip.images.pixels import Pixels
from pipeline.clip.images.prepared import ClassGroup
from pipeline.clip.images.ready_pixels import ReadyPixels, Room, decoding_threads
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.data.shards import IndexedShards
from pipeline.ranks.world import World, sum_over_ranks


class TestImages:
    """The test images of one dataset on this rank: row r is on rank r modulo the number of ranks.

    Features of the frozen image tower are computed once. `room` bounds the decoded pixels that are kept in memory for
    methods with image prompts, which read them once per unit; None keeps no pixels.
    """

    __test__ = False  # pytest would collect a class whose name starts with Test

    def __init__(
        self, shards: IndexedShards, pixels: Pixels, world: World, batch: int, room: Room | None = None
    ) -> None:
        self.world, self.batch = world, batch
        self._pixels = ReadyPixels(shards, pixels, room or Room(0), decoding_threads(world))
        self._places: dict[int, int] = {}  # row -> its index in the features
        self._features: list[Tensor] = []  # [n, J] each, of the frozen image tower

    def mine(self, group: ClassGroup) -> list[tuple[int, int]]:
        """(row, label) of this rank's share of a group."""
        return [(r, n) for r, n in zip(group.rows, group.labels, strict=True) if r % self.world.size == self.world.rank]

    def pixel_batches(self, rows: list[int]) -> Iterator[Tensor]:
        """Pixels [B, 3, H, W] of the rows in order, on this rank's device."""
        return self._pixels.batches(rows, self.batch, self.world.device)

    def features(self, module: PromptedCLIP, rows: list[int]) -> Tensor:
        """Features [N, J] of the frozen image tower; they are the same for every method without image prompts."""
        new = [row for row in rows if row not in self._places]
        if new:
            with torch.no_grad():
                self._features += [module.image_features(pixels).cpu() for pixels in self.pixel_batches(new)]
            self._features = [torch.cat(self._features)]
            self._places |= {row: len(self._places) + place for place, row in enumerate(new)}
        return self._features[0][torch.tensor([self._places[row] for row in rows], dtype=torch.long)]


def evaluate_group(module: PromptedCLIP, images: TestImages, group: ClassGroup) -> Counts:
    """Correct and total predictions by class, summed over all ranks; sets the classes of `module` to the group's."""
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
