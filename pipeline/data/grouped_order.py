"""The order of samples for batches that share images: questions about the same image are adjacent."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.keys import AnyKeys
from pipeline.data.order import Indices, Order

ROWS_AT_ONCE = 1 << 14


class GroupedOrder(Order):
    """`Order` in which up to `together` samples of a group are adjacent; the positions of groups are random.

    `groups` [N] is the number of each sample's group. As in `Order`, every sample counts exactly once per epoch, and
    the order is a function of (seed, task, epoch). The end of a batch may split a group.
    """

    def __init__(self, groups: npt.NDArray[np.int64], together: int, global_batch: int, seed: int, task: int) -> None:
        super().__init__(len(groups), global_batch, seed, task)
        self._groups, self._together = groups, together

    def _permute(self, epoch: int) -> Indices:
        order = super()._permute(epoch)
        groups = self._groups[order]
        by_group = np.argsort(groups, kind="stable")  # positions in the order, sorted by group
        starts = np.flatnonzero(np.diff(groups[by_group], prepend=-1))
        within = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        first = np.maximum.accumulate(np.where(within % self._together == 0, np.arange(len(order)), 0))
        # Each group takes the position of its first sample; the stable sort keeps the other members right after it.
        place = np.empty_like(order)
        place[by_group] = by_group[first]
        return order[np.argsort(place, kind="stable")]


def image_groups(keys: AnyKeys) -> npt.NDArray[np.int64]:
    """The number [N] of each sample's image, equal for equal images; each question without one has its own number.

    Images are identified by their keys, as data_prep computes one key per distinct image. Two images with equal keys
    would only be adjacent without sharing anything, because `collate` compares the images themselves.
    """
    digests = np.empty(len(keys.image), dtype="V16")
    row = 0
    for part in keys.image.split(ROWS_AT_ONCE):
        for content in part.contiguous().view(torch.uint8).numpy():
            digests[row] = hashlib.blake2b(content.data, digest_size=16).digest()
            row += 1
    alone = np.flatnonzero(~keys.has_image.numpy())
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    leader = first[group]  # [N] the first sample with the same key
    leader[alone] = alone
    # Numbered in the order of first appearance.
    return (np.cumsum(leader == np.arange(len(leader))) - 1)[leader].astype(np.int64)
