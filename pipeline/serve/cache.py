"""Keys and values of the running batch, kept once: tokens are written in place, rows come and go without a second copy.

transformers' own layer joins old and new into a third tensor at every token. Here a layer is a window into a buffer:
a token goes into the columns behind it, a row that leaves gives its place to the last one, a row that joins takes a
free place. Only where the buffer is too small it is made anew, one layer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64  # columns for further tokens in a buffer that is made anew


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, S, d] of one layer of the decoder; all rows end in the last column."""

    keys: Any  # Tensor; None in the base class before the first tokens
    values: Any

    def __init__(self, **named: Any) -> None:
        super().__init__(**named)
        self._buffers: tuple[Tensor, Tensor] | None = None  # [rows, heads, columns, d], keys and values
        self._rows, self._begin, self._end = 0, 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers or ())

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in the keys and values [B, heads, n, d] of further tokens; returns those of all tokens."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (key_states, value_states)  # of a prompt: as they are
            self._show(len(key_states), 0, key_states.shape[2])
            return self.keys, self.values
        end = self._end + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._make(self._rows, self._end - self._begin, ROOM + key_states.shape[2])
            end = self._end + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self._rows, :, self._end : end] = states
        self._show(self._rows, self._begin, end)
        return self.keys, self.values

    def cut(self, width: int) -> None:
        """Forget the tokens behind the first `width` columns."""
        self._show(self._rows, self._begin, self._begin + width)

    def narrow(self, rows: int, first: int) -> None:
        """Keep the first rows, without the columns before `first`."""
        self._show(rows, self._begin + first, self._end)

    def move(self, source: int, target: int) -> None:
        """Put one row in the place of another."""
        for buffer in self._buffers or ():
            buffer[target, :, self._begin : self._end] = buffer[source, :, self._begin : self._end]

    def append(self, other: GrowingLayer, width: int) -> None:
        """Take in the rows of another layer, which is empty afterwards; all get `width` columns, zeros in front."""
        rows, most = self._rows + other._rows, self._buffers[0].shape[0] if self._buffers else 0
        if rows > most or self._end < width:
            self._make(rows, width, ROOM)
        assert self._buffers is not None
        old, new = self._end - self._begin, other._end - other._begin
        begin = self._end - width
        for buffer, added in zip(self._buffers, (other.keys, other.values), strict=True):
            buffer[: self._rows, :, begin : self._end - old] = 0
            buffer[self._rows : rows, :, begin : self._end - new] = 0
            buffer[self._rows : rows, :, self._end - new : self._end] = added
        self._show(rows, begin, self._end)
        other._buffers, other.keys, other.values = None, None, None

    def taken(self, first: int) -> tuple[Tensor, Tensor]:
        """Copies, in the host's memory, of the rows from `first` on."""
        keys, values = (part[first:].to("cpu", copy=True) for part in (self.keys, self.values))
        return keys, values

    def release(self) -> None:
        """Give back what the buffers have beyond the window; takes no further memory of the device."""
        if self._buffers is None or self._buffers[0].shape[0] == self._rows:
            return
        kept = [part.to("cpu", copy=True) for part in (self.keys, self.values)]
        self._buffers, self.keys, self.values = None, None, None
        self._buffers = (kept[0].to(self.device), kept[1].to(self.device))
        self._show(self._rows, 0, kept[0].shape[2])

    def _make(self, rows: int, width: int, room: int) -> None:
        """Buffers with place for so many rows, `width` columns up to the last one and `room` behind it."""
        assert self._buffers is not None
        begin = max(0, width - (self._end - self._begin))
        made = []
        for buffer in self._buffers:
            larger = buffer.new_empty(rows, buffer.shape[1], width + room, buffer.shape[3])
            larger[: self._rows, :, begin:width] = buffer[: self._rows, :, self._begin : self._end]
            made.append(larger)
        self._buffers = (made[0], made[1])
        self._show(self._rows, begin, width)

    def _show(self, rows: int, begin: int, end: int) -> None:
        assert self._buffers is not None
        self._rows, self._begin, self._end = rows, begin, end
        self.keys, self.values = (buffer[:rows, :, begin:end] for buffer in self._buffers)


def new_cache() -> Cache:
    """An empty cache of such layers; the decoder makes as many as it has."""
    return Cache(layer_class_to_replicate=GrowingLayer)


def cache_of(layers: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Cache:
    """A cache of keys and values that were `taken` from another."""
    cache = new_cache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys.to(device), values.to(device), number)
    return cache


def layers_of(cache: Cache) -> list[GrowingLayer]:
    """The layers of such a cache."""
    return cache.layers
