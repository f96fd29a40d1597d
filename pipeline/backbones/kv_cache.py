"""Key-value cache of a decoding batch, written in place, whose rows can be added and removed.

transformers' `DynamicLayer` concatenates old and new keys into a new tensor at every token. Here a layer is a window
into a preallocated buffer: a token is written into the column after the window, the last row is copied over a removed
one, and a new row takes a free place. A full buffer is reallocated one layer at a time, so that at most one layer's
cache exists twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64  # free columns in a new buffer, for tokens to come


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, S, d] of one decoder layer; all rows end in the last column.

    `room` is the number of free columns after the window in a new buffer.
    """

    keys: Any  # Tensor; None in the base class before the first tokens
    values: Any

    def __init__(self, room: int = ROOM, **named: Any) -> None:
        super().__init__(**named)
        self.room = room
        self._buffers: tuple[Tensor, Tensor] | None = None  # [rows, heads, columns, d], keys and values
        self._rows, self._begin, self._end = 0, 0, 0

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.nbytes for buffer in self._buffers or ())

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, heads, n, d] of n new tokens; returns those of all tokens."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (key_states, value_states)  # the prompt's tensors become the buffers without a copy
            self._show(len(key_states), 0, key_states.shape[2])
            return self.keys, self.values
        end = self._end + key_states.shape[2]
        if end > self._buffers[0].shape[2]:
            self._allocate(self._rows, self._end - self._begin, self.room + key_states.shape[2])
            end = self._end + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self._rows, :, self._end : end] = states
        self._show(self._rows, self._begin, end)
        return self.keys, self.values

    def cut(self, width: int) -> None:
        """Keep only the first `width` columns."""
        self._show(self._rows, self._begin, self._begin + width)

    def narrow(self, rows: int, first: int) -> None:
        """Keep the first `rows` rows and the columns from `first` on."""
        self._show(rows, self._begin + first, self._end)

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        for buffer in self._buffers or ():
            buffer[target, :, self._begin : self._end] = buffer[source, :, self._begin : self._end]

    def append(self, other: GrowingLayer, width: int) -> None:
        """Move the rows of another layer into this one; shorter rows are padded on the left to `width` columns."""
        rows, most = self._rows + other._rows, self._buffers[0].shape[0] if self._buffers else 0
        if rows > most or self._end < width:
            self._allocate(rows, width, self.room)
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
        """Copy the rows from `first` on to host memory."""
        keys, values = (part[first:].to("cpu", copy=True) for part in (self.keys, self.values))
        return keys, values

    def release(self) -> None:
        """Shrink the buffers to the window, through host memory: no second copy is allocated on the device."""
        if self._buffers is None or self._buffers[0].shape[0] == self._rows:
            return
        kept = [part.to("cpu", copy=True) for part in (self.keys, self.values)]
        self._buffers, self.keys, self.values = None, None, None
        self._buffers = (kept[0].to(self.device), kept[1].to(self.device))
        self._show(self._rows, 0, kept[0].shape[2])

    def _allocate(self, rows: int, width: int, room: int) -> None:
        """Reallocate the buffers: `rows` rows, `width` columns up to the last token, `room` free columns after it."""
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


def new_cache(room: int = ROOM) -> Cache:
    """An empty cache of growing layers; transformers adds a layer when the decoder first writes to it."""
    return Cache(layer_class_to_replicate=partial(GrowingLayer, room))


def cache_of(layers: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Cache:
    """A cache with these keys and values of every layer, as `GrowingLayer.taken` returns them."""
    cache = new_cache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys.to(device), values.to(device), number)
    return cache


def layers_of(cache: Cache) -> list[GrowingLayer]:
    """The layers of a cache made by `new_cache` or `cache_of`."""
    return cache.layers
