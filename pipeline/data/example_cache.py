"""Tokenised samples of a small data set, kept so that their images are decoded only once."""

from __future__ import annotations

from pipeline.data.example import Example

CACHE_BYTES = 256 << 20


class ExampleCache:
    """Keeps the examples of a data set of `count` samples, or none where they take more than `limit` bytes.

    In an order that is new every epoch, a part of a large data set would be thrown out again before it is asked for,
    and every loader process of every rank would hold such a part.
    """

    def __init__(self, count: int, limit: int = CACHE_BYTES) -> None:
        self.count, self.limit = count, limit
        self.bytes = 0
        self.off = count == 0
        self._examples: dict[int, Example] = {}

    def get(self, index: int) -> Example | None:
        return self._examples.get(index)

    def put(self, index: int, example: Example) -> None:
        """Keep an example; the first ones tell how much all will take."""
        if self.off or index in self._examples:
            return
        self._examples[index] = example
        self.bytes += example.nbytes
        if self.bytes * self.count > self.limit * len(self._examples):
            self.off = True
            self._examples.clear()
            self.bytes = 0
