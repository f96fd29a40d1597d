"""Training batches: the few-shot images of one seed, augmented, in an order that depends on that seed alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.clip.images.pixels import Pixels
from pipeline.clip.images.prepared import ClassGroup
from pipeline.clip.learning.model import ImageBatch
from pipeline.clip.learning.protocol import steps_per_epoch
from pipeline.clip.recipe import ClipTrainConfig
from pipeline.data.order import Order, rank_slice
from pipeline.data.shards import IndexedShards
from pipeline.errors import UserError


class FewShotImages:
    """The training images of a group of classes; `features` [N, J] replace pixels where they were computed once."""

    def __init__(self, shards: IndexedShards, group: ClassGroup, pixels: Pixels, seed: int, augment: bool) -> None:
        self.shards, self.group, self.pixels = shards, group, pixels
        self.seed, self.augment = seed, augment
        self.features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.group.rows)

    def name(self, index: int) -> str:
        """The id of an image: the path of its file."""
        return self.shards.ids[self.group.rows[index]]

    def image(self, index: int, epoch: int) -> Tensor:
        """Pixels [3, H, W]; UserError when the image cannot be decoded."""
        row = self.group.rows[index]
        try:
            picture = self.shards[row].picture()
        except OSError as error:
            where = f"{self.shards.folder}: the image {self.name(index)}"
            raise UserError(f"{where} cannot be decoded ({error}). Prepare the data again.") from error
        assert picture is not None, "every sample of a class has an image"
        if not self.augment:
            return self.pixels.plain(picture)
        return self.pixels.augmented(picture, self.seed, epoch, self.name(index))

    def batch(self, indices: Sequence[int], weights: Sequence[float], epoch: int) -> ImageBatch:
        """The batch of the images at `indices`; a weight of 0 marks one that only fills the batch."""
        kept = None if self.features is None else self.features[torch.tensor(indices)]
        pixels = torch.stack([self.image(index, epoch) for index in indices]) if kept is None else None
        labels = torch.tensor([self.group.labels[index] for index in indices])
        ids = tuple(self.name(index) for index in indices)
        return ImageBatch(pixels, labels, torch.tensor(weights, dtype=torch.float32), kept, ids)


class FewShotBatches(Dataset[ImageBatch]):
    """The micro-batches of one rank; item i belongs to step i // accumulation.

    As in the published runs an epoch has whole batches only, and drops the images that remain. Where the number of
    ranks does not divide the batch, samples of weight 0 fill it, so the loss equals that of one rank.
    """

    def __init__(
        self, images: FewShotImages, train: ClipTrainConfig, micro: int, accumulation: int, rank: int, world: int
    ) -> None:
        self.images = images
        self.order = Order(len(images), train.global_batch, images.seed, task=0)
        self.steps_per_epoch = steps_per_epoch(len(images), train.global_batch)
        self.steps = train.epochs * self.steps_per_epoch
        self.micro, self.accumulation, self.rank, self.world = micro, accumulation, rank, world

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __getitem__(self, item: int) -> ImageBatch:
        step, number = divmod(item, self.accumulation)
        epoch, batch = divmod(step, self.steps_per_epoch)
        indices, weights = self.order.batch(epoch, batch)
        room = self.micro * self.accumulation * self.world
        filled, shares = np.resize(indices, room), np.pad(weights, (0, room - len(weights)))
        part = slice(number * self.micro, (number + 1) * self.micro)
        mine = [rank_slice(values, self.rank, self.world)[part].tolist() for values in (filled, shares)]
        return self.images.batch(mine[0], mine[1], epoch)


def micro_batches(global_batch: int, micro: int | None, world: int) -> tuple[int, int]:
    """(samples per rank and forward pass, accumulation steps); samples of weight 0 fill the last micro-batch."""
    share = -(-global_batch // world)
    micro = min(micro or share, share)
    return micro, -(-share // micro)
