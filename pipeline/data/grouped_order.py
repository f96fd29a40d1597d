"""The order of a stage whose batches share images: questions about one image stand together."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.keys import AnyKeys
from pipeline.data.order import Indices, Order

ROWS_AT_ONCE = 1 << 14


class GroupedOrder(Order):
    """`Order` with up to `together` samples of a group side by side; the groups' places are as random as before.

    `groups` [N]: a number for each sample. Every sample still counts exactly once per epoch, and the order is a
    function of (seed, task, epoch) as before. A group may be cut where a batch ends.
    """

    def __init__(self, groups: npt.NDArray[np.int64], together: int, global_batch: int, seed: int, task: int) -> None:
        super().__init__(len(groups), global_batch, seed, task)
        self._groups, self._together = groups, together

    def _permute(self, epoch: int) -> Indices:
        order = super()._permute(epoch)
        groups = self._groups[order]
        by_group = np.argsort(groups, kind="stable")  # places in the order, those of a group together
        starts = np.flatnonzero(np.diff(groups[by_group], prepend=-1))
        within = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        first = np.maximum.accumulate(np.where(within % self._together == 0, np.arange(len(order)), 0))
        # A handful stands where its first sample stood; a stable sort keeps the rest of it behind that.
        place = np.empty_like(order)
        place[by_group] = by_group[first]
        return order[np.argsort(place, kind="stable")]


def image_groups(keys: AnyKeys) -> npt.NDArray[np.int64]:
    """A number [N] for each sample's image, equal for equal images; questions without one have a number each.

    Images are told apart by their keys: data_prep computes one for each distinct image. Should two images have the
    same key, they stand together in vain, for a batch shares only what is equal (`collate`).
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
    # Numbered in the order in which they appear first.
    return (np.cumsum(leader == np.arange(len(leader))) - 1)[leader].astype(np.int64)
