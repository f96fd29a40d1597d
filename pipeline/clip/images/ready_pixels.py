"""Test images as pixels, decoded by threads ahead of the model and, where they fit, once for all methods and seeds.

What is kept are the 8-bit pixels after resizing and cropping, a quarter of what the model reads; their normalisation is
a table of 256 values per channel, looked up where the model is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import psutil
import torch
from torch import Tensor

from pipeline.clip.images.pixels import Pixels
from pipeline.data.sample import Sample
from pipeline.data.shards import IndexedShards
from pipeline.errors import UserError
from pipeline.ranks.environment import launched_ranks_per_node
from pipeline.ranks.world import World

MOST_KEPT = 8 << 30  # bytes on one machine: ImageNet's 50,000 test images at 224 pixels are 7.5 GB
MOST_OF_FREE = 0.5  # share of the free memory that they may take
AHEAD = 4  # pictures that wait per thread


class Room:
    """Bytes for kept pixels on this rank; what is taken is never given back."""

    def __init__(self, left: int) -> None:
        self.left = left

    @classmethod
    def of(cls, world: World) -> Room:
        """This rank's share of the machine's memory."""
        free = int(psutil.virtual_memory().available * MOST_OF_FREE)
        return cls(min(MOST_KEPT, free) // ranks_here(world))

    def take(self, size: int) -> bool:
        """Whether so many bytes were left; they are taken then."""
        if size > self.left:
            return False
        self.left -= size
        return True


class ReadyPixels:
    """The pixels of one split's images by their row."""

    def __init__(self, shards: IndexedShards, pixels: Pixels, room: Room, threads: int) -> None:
        self.shards, self.pixels, self.room, self.threads = shards, pixels, room, max(1, threads)
        self._kept: dict[int, np.ndarray] = {}  # row -> [3, H, W] uint8

    def batches(self, rows: Sequence[int], size: int, device: torch.device) -> Iterator[Tensor]:
        """Pixels [B, 3, H, W] of the rows in turn, `size` at a time; UserError for an image that cannot be decoded."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            # Read here, one after the other, and decoded there: Pillow and numpy let other threads run meanwhile.
            waiting = (None if row in self._kept else pool.submit(self._decode, row, self.shards[row]) for row in rows)
            found = self._in_turn(rows, waiting)
            while batch := list(islice(found, size)):
                yield self.pixels.normalised(torch.from_numpy(np.stack(batch)).to(device))

    def _in_turn(self, rows: Sequence[int], waiting: Iterator[Future[np.ndarray] | None]) -> Iterator[np.ndarray]:
        started: list[Future[np.ndarray] | None] = []
        for row in rows:
            started += islice(waiting, self.threads * AHEAD + 1 - len(started))
            decoding = started.pop(0)
            if decoding is None:
                yield self._kept[row]
                continue
            picture = decoding.result()
            if row not in self._kept and self.room.take(picture.nbytes):
                self._kept[row] = picture
            yield picture

    def _decode(self, row: int, sample: Sample) -> np.ndarray:
        try:
            picture = sample.picture()
        except (OSError, ValueError, SyntaxError) as error:
            where = f"{self.shards.folder}: the image {self.shards.ids[row]}"
            raise UserError(f"{where} cannot be decoded ({error}). Prepare the data again.") from error
        assert picture is not None, "every sample of a class has an image"
        return self.pixels.cropped(picture)


def decoding_threads(world: World) -> int:
    """Threads that decode on this rank: its share of the machine's processors."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here(world))


def ranks_here(world: World) -> int:
    """Ranks on this machine, as the launcher says; all of them where it does not."""
    return launched_ranks_per_node() or world.size
