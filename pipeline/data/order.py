"""The order of samples and their batches: a function of (seed, task, epoch), so a restart needs only two integers.

See docs/design.md 3.5 and 7.5. Batches are global; only `rank_slice` depends on ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pipeline.errors import UserError

Indices = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
Scalar = TypeVar("Scalar", bound=np.generic)

# Independent random streams of one (seed, task, epoch).
_SAMPLES, _BATCHES = 0, 1


class Order:
    """The batches of every epoch over `count` samples; each sample counts exactly once per epoch.

    `lengths` (any unit, one per sample) turns on length buckets: samples are sorted by length inside windows of
    `bucket_window` batches, then the batches are shuffled. The ragged last batch stays random and stays last.
    """

    def __init__(
        self,
        count: int,
        global_batch: int,
        seed: int,
        task: int,
        lengths: Sequence[int] | npt.NDArray[np.integer] | None = None,
        bucket_window: int = 50,
    ) -> None:
        if count < 1 or global_batch < 1 or bucket_window < 1:
            raise UserError(
                f"An order needs at least one sample, a global batch and a bucket window of at least 1; found "
                f"{count} samples, global batch {global_batch}, window {bucket_window}."
            )
        if lengths is not None and len(lengths) != count:
            raise UserError(f"Length buckets need one length per sample: found {len(lengths)} for {count} samples.")
        self.count = count
        self.global_batch = global_batch
        self.seed = seed
        self.task = task
        self.bucket_window = bucket_window
        self._lengths = None if lengths is None else np.asarray(lengths, dtype=np.int64)
        # Indices [count] of the samples that are used, where some are left out.
        self.rows: Indices | None = None
        self._epoch: tuple[int, Indices] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Number of global batches in one epoch, the filled-up last one included."""
        return -(-self.count // self.global_batch)

    def batch(self, epoch: int, index: int) -> tuple[Indices, Weights]:
        """Return sample indices [G] and weights [G] of one global batch; a weight of 0 marks a duplicate that fills
        up the last batch."""
        if not 0 <= index < self.batches_per_epoch:
            raise IndexError(f"batch {index} of an epoch of {self.batches_per_epoch} batches")
        order = self.epoch(epoch)  # [count]
        positions = np.arange(index * self.global_batch, (index + 1) * self.global_batch)
        weights = (positions < self.count).astype(np.float32)
        picked = order[positions % self.count]
        return (picked if self.rows is None else self.rows[picked]), weights

    def epoch(self, epoch: int) -> Indices:
        """Return all sample indices [count] of one epoch in the order of use."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = self._permute(epoch)
            order.flags.writeable = False
            self._epoch = (epoch, order)
        return self._epoch[1]

    def _permute(self, epoch: int) -> Indices:
        order = _permutation(self.count, self.seed, self.task, epoch, _SAMPLES)
        if self._lengths is None:
            return order
        # Only whole batches are sorted, so that the samples of the ragged batch are random and not the longest ones.
        whole = self.count // self.global_batch
        end = whole * self.global_batch
        window = self.bucket_window * self.global_batch
        for start in range(0, end, window):
            part = order[start : min(start + window, end)]
            part[:] = part[np.argsort(self._lengths[part], kind="stable")]
        batches = order[:end].reshape(whole, self.global_batch)
        order[:end] = batches[_permutation(whole, self.seed, self.task, epoch, _BATCHES)].reshape(-1)
        return order


def rank_slice(batch: npt.NDArray[Scalar], rank: int, world: int) -> npt.NDArray[Scalar]:
    """Return the contiguous part [G / world] of a global batch [G] (indices or weights) that belongs to `rank`.

    Raises UserError with the world sizes that fit when `world` does not divide G.
    """
    total = len(batch)
    if total % world:
        fitting = [size for size in range(1, total + 1) if total % size == 0]
        raise UserError(
            f"A global batch of {total} cannot be split evenly over {world} ranks; "
            f"use one of {', '.join(map(str, fitting))} ranks or change train.global_batch."
        )
    share = total // world
    return batch[rank * share : (rank + 1) * share]


def _permutation(count: int, seed: int, task: int, epoch: int, stream: int) -> Indices:
    # Sorting raw Philox words instead of Generator.permutation: numpy guarantees the same words in every version, but
    # not the same permutation. Ties (probability 2^-64) are resolved by the stable sort.
    key = np.array([seed % 2**64, ((task % 2**32) << 32) | (epoch % 2**32)], dtype=np.uint64)
    words = np.random.Philox(key=key, counter=[0, 0, 0, stream]).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)
