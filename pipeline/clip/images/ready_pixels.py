"""Test images as pixels, decoded by threads ahead of the model and, where they fit into memory, only once.

The cache holds 8-bit pixels after resizing and cropping, a quarter of the size of float32 pixels. They are normalised
on the model's device, by a table of 256 values per channel.
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
MOST_OF_FREE = 0.5  # share of the available memory that kept pixels may take
AHEAD = 4  # images that wait decoded or queued, per thread


class Room:
    """The number of bytes left on this rank for kept pixels; pixels are kept until the run ends."""

    def __init__(self, left: int) -> None:
        self.left = left

    @classmethod
    def of(cls, world: World) -> Room:
        """This rank's share of the machine's budget: the smaller of MOST_KEPT and a share of the available memory."""
        free = int(psutil.virtual_memory().available * MOST_OF_FREE)
        return cls(min(MOST_KEPT, free) // ranks_here(world))

    def take(self, size: int) -> bool:
        """Reserve `size` bytes; False, and nothing reserved, when fewer are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class ReadyPixels:
    """The pixels of one split's images by row."""

    def __init__(self, shards: IndexedShards, pixels: Pixels, room: Room, threads: int) -> None:
        self.shards, self.pixels, self.room, self.threads = shards, pixels, room, max(1, threads)
        self._kept: dict[int, np.ndarray] = {}  # row -> [3, H, W] uint8

    def batches(self, rows: Sequence[int], size: int, device: torch.device) -> Iterator[Tensor]:
        """Pixels [B, 3, H, W] of the rows in order, `size` at a time; UserError for an image that cannot be decoded."""
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:
            # Files are read in this thread and decoded in the pool: Pillow and numpy release the GIL while decoding.
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
    """The number of decoding threads of this rank: its share of the processors that the process may use."""
    return max(1, len(os.sched_getaffinity(0)) // ranks_here(world))


def ranks_here(world: World) -> int:
    """The number of ranks on this machine, from the launcher's environment; without it, the number of all ranks."""
    return launched_ranks_per_node() or world.size
