"""Key-value cache of a decoding batch that is written in place, and that rows join and leave.

transformers' `DynamicLayer` concatenates old and new keys into a third tensor at every token. Here a layer is a window
into a preallocated buffer: a token is written into the columns behind the window, the last row moves to the place of
one that leaves, and a row that joins takes a free place. A buffer that is too small is allocated anew, one layer at a
time, so that the cache of no more than one layer exists twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64  # free columns for further tokens in a new buffer


class GrowingLayer(DynamicLayer):
    """Keys and values [B, heads, S, d] of one layer of the decoder; all rows end in the last column.

    `room` is the number of free columns behind the window of a new buffer.
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
        """Append the keys and values [B, heads, n, d] of further tokens; returns those of all tokens."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (key_states, value_states)  # a prompt's tensors become the buffers, without a copy
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
        """Drop the tokens behind the first `width` columns."""
        self._show(self._rows, self._begin, self._begin + width)

    def narrow(self, rows: int, first: int) -> None:
        """Keep the first rows, without the columns before `first`."""
        self._show(rows, self._begin + first, self._end)

    def move(self, source: int, target: int) -> None:
        """Copy one row over another."""
        for buffer in self._buffers or ():
            buffer[target, :, self._begin : self._end] = buffer[source, :, self._begin : self._end]

    def append(self, other: GrowingLayer, width: int) -> None:
        """Take in the rows of another layer, which is empty afterwards; all get `width` columns, zeros in front."""
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
        """Copies, in the host's memory, of the rows from `first` on."""
        keys, values = (part[first:].to("cpu", copy=True) for part in (self.keys, self.values))
        return keys, values

    def release(self) -> None:
        """Free what the buffers have beyond the window, by way of the host: needs no further memory of the device."""
        if self._buffers is None or self._buffers[0].shape[0] == self._rows:
            return
        kept = [part.to("cpu", copy=True) for part in (self.keys, self.values)]
        self._buffers, self.keys, self.values = None, None, None
        self._buffers = (kept[0].to(self.device), kept[1].to(self.device))
        self._show(self._rows, 0, kept[0].shape[2])

    def _allocate(self, rows: int, width: int, room: int) -> None:
        """New buffers for so many rows, with `width` columns up to the last one and `room` behind it."""
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
    """An empty cache of such layers; the decoder makes as many as it has."""
    return Cache(layer_class_to_replicate=partial(GrowingLayer, room))


def cache_of(layers: Sequence[tuple[Tensor, Tensor]], device: torch.device) -> Cache:
    """A cache of keys and values that were `taken` from another."""
    cache = new_cache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys.to(device), values.to(device), number)
    return cache


def layers_of(cache: Cache) -> list[GrowingLayer]:
    """The layers of such a cache."""
    return cache.layers
