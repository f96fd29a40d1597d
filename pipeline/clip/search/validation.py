"""The validation images of a search, and its batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.clip.images.prepared import ClassGroup
from pipeline.clip.images.ready_pixels import ReadyPixels
from pipeline.clip.learning.model import ImageBatch
from pipeline.data.order import Order, rank_slice
from pipeline.errors import UserError
from pipeline.ranks.world import World

# The stream of random orders beside that of training images, so that one seed gives both.
STREAM = 1


@dataclass(frozen=True)
class SearchImages:
    """The images of a search: those the prompts learn from, and those the weights of the options learn from."""

    train: ClassGroup
    validation: ClassGroup
    held_out: bool  # whether the validation images are training images
    notes: tuple[str, ...]  # what is to be said of them


def search_images(dataset: str, shots: ClassGroup, own: ClassGroup | None, most: int) -> SearchImages:
    """The images of a search on a dataset; never test images.

    Args:
        dataset: its name.
        shots: the few-shot training images.
        own: the dataset's validation images of the same classes; None: it has none, and training images are held out.
        most: how many images of a class may be held out.

    Raises:
        UserError: there are no validation images, and too few training images to hold any out.
    """
    train, validation = (shots, own) if own is not None and own.rows else hold_out(shots, most)
    held_out, notes = validation is not own, []
    if not validation.rows:
        raise UserError(
            f"{dataset} has no validation images, and one training image per class, so none can be held out for the "
            "search. Take two shots or more, or give the lengths in options."
        )
    if held_out:
        notes.append(
            f"{dataset} has no validation images; the search validates on {len(validation.rows)} of the "
            f"{len(shots.rows)} training images instead, which it does not train on. The training after it has them "
            "all."
        )
    without = len(shots.names) - len(set(validation.labels))
    if without:
        notes.append(
            f"{without} of the {len(shots.names)} classes of {dataset} have no validation image, so the search is not "
            "told how it does on them."
        )
    return SearchImages(train, validation, held_out, tuple(notes))


def hold_out(group: ClassGroup, most: int) -> tuple[ClassGroup, ClassGroup]:
    """The training images of a search, and those it validates on, where a dataset has no validation images.

    Of each class the last `most` images are held out, and at most half of them.
    """
    held: set[int] = set()
    by_label: dict[int, list[int]] = {}
    for place, label in enumerate(group.labels):
        by_label.setdefault(label, []).append(place)
    for places in by_label.values():
        held.update(places[len(places) - min(most, len(places) // 2) :])
    return (
        _part(group, [place for place in range(len(group.rows)) if place not in held]),
        _part(group, sorted(held)),
    )


def _part(group: ClassGroup, places: Sequence[int]) -> ClassGroup:
    return ClassGroup(
        group.names, tuple(group.rows[place] for place in places), tuple(group.labels[place] for place in places)
    )


class ValidationBatches:
    """One batch per step, as in evaluation (not augmented), split over the ranks.

    Shuffled batches pass through all images before any comes again; the last one of a pass has fewer, filled with
    images of weight 0. With `first` every step has the first images in the order in which they were drawn.

    Args:
        pixels: the images.
        group: rows and labels of the validation images.
        size: images per batch, over all ranks.
        seed: of the orders.
        world: the ranks.
        first: take the same first images at every step, as released.
    """

    def __init__(
        self, pixels: ReadyPixels, group: ClassGroup, size: int, seed: int, world: World, first: bool = False
    ) -> None:
        self.pixels, self.group, self.world, self.first = pixels, group, world, first
        self.size = min(size, len(group.rows))
        self.order = Order(len(group.rows), self.size, seed, task=STREAM)

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The places [B] in the group of a step's images, and their weights [B], over all ranks."""
        if self.first:
            return np.arange(self.size), np.ones(self.size, dtype=np.float32)
        return self.order.batch(*divmod(step, self.order.batches_per_epoch))

    def __call__(self, step: int) -> tuple[ImageBatch, float]:
        """This rank's images of a step, and the weight of all ranks' together."""
        places, weights = self.places(step)
        room = -(-self.size // self.world.size) * self.world.size
        filled, shares = np.resize(places, room), np.pad(weights, (0, room - len(weights)))
        mine, own = (rank_slice(values, self.world.rank, self.world.size) for values in (filled, shares))
        rows = [self.group.rows[place] for place in mine.tolist()]
        (pixels,) = self.pixels.batches(rows, len(rows), self.world.device)
        labels = torch.tensor([self.group.labels[place] for place in mine.tolist()])
        ids = tuple(self.pixels.shards.ids[row] for row in rows)
        return ImageBatch(pixels, labels, torch.from_numpy(np.array(own)), ids=ids), float(weights.sum())
