"""A cache of a small dataset's tokenised samples, so that their images are decoded only once."""

from __future__ import annotations

from pipeline.data.example import Example

CACHE_BYTES = 256 << 20  # per loader process


class ExampleCache:
    """Caches the examples of a dataset of `count` samples, or none where all take more than `limit` bytes.

    Caching a part of a larger dataset has no use: the order is new in every epoch, so examples would be evicted before
    they are used again, and every loader process of every rank would hold its own part.
    """

    def __init__(self, count: int, limit: int = CACHE_BYTES) -> None:
        self.count, self.limit = count, limit
        self.bytes = 0
        self.off = count == 0
        self._examples: dict[int, Example] = {}

    def get(self, index: int) -> Example | None:
        return self._examples.get(index)

    def put(self, index: int, example: Example) -> None:
        """Cache an example; the mean size of those so far is the estimate for all."""
        if self.off or index in self._examples:
            return
        self._examples[index] = example
        self.bytes += example.nbytes
        if self.bytes * self.count > self.limit * len(self._examples):
            self.off = True
            self._examples.clear()
            self.bytes = 0
