"""Key-value cache of a decoding batch: every token is written once, into memory that is allocated for the whole batch.

transformers' `DynamicLayer` concatenates old and new keys into a new tensor at every token. Here a layer is a window
[rows, heads, S, d] into buffers [slots, heads, columns, d]. A prompt is read directly into free slots, a token is
written into the column after the window, and the last row is copied over a removed one. Rows that need other columns
than the buffers have are rearranged within the same memory; more is allocated only for more tokens than it holds, one
layer at a time, so that at most one layer's keys and values exist twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64  # columns are allocated in multiples of it


@dataclass
class CacheSpace:
    """How much memory the layers of one cache allocate.

    Memory is allocated for `slots` rows at once, and for as many more when these are used, as long as rows times
    columns do not exceed `most` tokens (None: no bound). With `whole` there are columns for the longest answer of a row
    as soon as it joins; else for `ROOM` more tokens, and for further ones when these are used.
    """

    slots: int = 0
    most: int | None = None
    whole: bool = False
    peak: int = field(default=0, init=False)  # the most bytes at a time, those included that were being replaced
    # Replaced and never changed, because another thread may ask for the bytes.
    _layers: tuple[ref[WindowLayer], ...] = field(default=(), init=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers of all layers."""
        layers = (known() for known in self._layers)
        return sum(layer.nbytes for layer in layers if layer is not None)

    def layout(self, rows: int, columns: int) -> tuple[int, int]:
        """Slots and columns of buffers for at least so many rows and columns."""
        rounded = -(-columns // ROOM) * ROOM
        if self.most is not None and rows * rounded > self.most:
            return rows, columns
        slots = rows if not self.slots else -(-rows // self.slots) * self.slots
        return (slots if self.most is None else max(rows, min(slots, self.most // rounded))), rounded

    def allocated(self, layer: WindowLayer, size: int) -> None:
        """Count bytes that a layer has allocated and does not hold yet."""
        others = (known for known in self._layers if known() is not None and known() is not layer)
        self._layers = (*others, ref(layer))
        self.peak = max(self.peak, self.nbytes + size)


class WindowLayer(DynamicLayer):
    """Keys and values [B, heads, S, d] of one decoder layer; all rows end in the last column.

    Before the first tokens it has no buffers; `least` is then the number of columns to allocate at least.
    """

    keys: Any  # Tensor; None in the base class before the first tokens
    values: Any

    def __init__(self, space: CacheSpace, least: int = 0, **named: Any) -> None:
        super().__init__(**named)
        self.space, self.least = space, least
        self._flat: tuple[Tensor, Tensor] | None = None  # the memory of keys and values, one-dimensional
        self._buffers: tuple[Tensor, Tensor] | None = None  # views of it [slots, heads, columns, d]
        self._first, self._rows, self._begin, self._end = 0, 0, 0, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, heads, n, d] of n new tokens; returns those of all tokens."""
        new = key_states.shape[2]
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            self._rows = len(key_states)
            self._allocate((key_states, value_states), *self.space.layout(self._rows, max(new, self.least)))
        elif self._end + new > self._columns:
            width = self._end - self._begin
            self._arrange(width, self._rows, width + new + ROOM)
        end = self._end + new
        for buffer, states in zip(self._pair, (key_states, value_states), strict=True):
            buffer[self._first : self._first + self._rows, :, self._end : end] = states
        self._show(self._rows, self._begin, end)
        return self.keys, self.values

    def reserve(self, rows: int, width: int, room: int) -> None:
        """Make the buffers hold `rows` rows of `width` columns with `room` free columns after them."""
        slots, columns = len(self._pair[0]), self._columns
        if slots < rows or columns < width + room:
            self._arrange(width, rows, width + room)
        elif not width <= self._end <= columns - room:
            self._arrange(width, rows, columns)

    def opened(self, rows: int, width: int) -> WindowLayer:
        """The next free rows as a layer of their own, to be filled with `width` columns; `reserve` was called."""
        part = WindowLayer(self.space)
        part.dtype, part.device, part.is_initialized = self.dtype, self.device, True
        part._flat, part._buffers, part._first = self._flat, self._buffers, self._rows
        part._show(rows, self._end - width, self._end - width)
        return part

    def claim(self, rows: int, width: int) -> None:
        """Add the filled rows of `opened` to the window; the columns before shorter rows become zero."""
        old, begin = self._end - self._begin, self._end - max(width, self._end - self._begin)
        for buffer in self._pair:
            # What masks hide is multiplied by zero, so it must not be NaN.
            buffer[: self._rows, :, begin : self._end - old] = 0
            buffer[self._rows : self._rows + rows, :, begin : self._end - width] = 0
        self._show(self._rows + rows, begin, self._end)

    def cut(self, width: int) -> None:
        """Keep only the first `width` columns."""
        self._show(self._rows, self._begin, self._begin + width)

    def narrow(self, rows: int, first: int) -> None:
        """Keep the first `rows` rows and the columns from `first` on."""
        self._show(rows, self._begin + first, self._end)

    def move(self, source: int, target: int) -> None:
        """Copy row `source` over row `target`."""
        for buffer in self._pair:
            buffer[target, :, self._begin : self._end] = buffer[source, :, self._begin : self._end]

    def taken(self, first: int) -> tuple[Tensor, Tensor]:
        """Copy the rows from `first` on to host memory."""
        keys, values = (part[first:].to("cpu", copy=True) for part in (self.keys, self.values))
        return keys, values

    def release(self) -> None:
        """Shrink the buffers to the window, through host memory: no second copy is allocated on the device."""
        if self._flat is None or self._flat[0].numel() == self.keys.numel():
            return
        kept = [part.to("cpu", copy=True) for part in (self.keys, self.values)]
        self._flat, self._buffers, self.keys, self.values = None, None, None, None
        self._allocate((kept[0], kept[1]), *kept[0].shape[::2])
        for buffer, part in zip(self._pair, kept, strict=True):
            buffer.copy_(part)
        self._show(self._rows, 0, kept[0].shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(flat.nbytes for flat in self._flat or ())

    @property
    def _pair(self) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        return self._buffers

    @property
    def _columns(self) -> int:
        return self._pair[0].shape[2]

    def _allocate(self, like: tuple[Tensor, Tensor], slots: int, columns: int) -> None:
        """Allocate memory for keys and values with the heads, width and precision of `like`."""
        flat = [states.new_empty(slots * _row(states, columns), device=self.device) for states in like]
        self.space.allocated(self, sum(part.nbytes for part in flat))
        self._use((flat[0], flat[1]), like, columns)
        self._begin = self._end = 0

    def _use(self, flat: tuple[Tensor, Tensor], like: tuple[Tensor, Tensor], columns: int) -> None:
        views = [_view(part, states, columns) for part, states in zip(flat, like, strict=True)]
        self._flat, self._buffers = flat, (views[0], views[1])

    def _arrange(self, end: int, rows: int, columns: int) -> None:
        """Make the buffers hold `rows` rows of `columns` columns, and let the window end before column `end`.

        Within the memory that there is, where it suffices. Its rows are moved one by one: away from each other from the
        last one on, and together from the first one on, so that no row is written over one that has not been moved.
        """
        assert self._flat is not None
        old, flat, window = self._pair, self._flat, slice(self._begin, self._end)
        slots, rounded = self.space.layout(rows, columns)
        fitting = [each for each in (rounded, columns) if self._fits(rows, each)]
        # Allocated before anything is moved, so that nothing is half moved where memory runs out.
        if not fitting:
            made = [part.new_empty(slots * _row(buffer, rounded)) for part, buffer in zip(flat, old, strict=True)]
            self.space.allocated(self, sum(part.nbytes for part in made))
            flat = (made[0], made[1])
        moved = [torch.empty_like(buffer[0, :, window]) for buffer in old]
        self._use(flat, old, fitting[0] if fitting else rounded)
        begin = end - (window.stop - window.start)
        apart = self._columns > old[0].shape[2]
        for row in reversed(range(self._rows)) if apart else range(self._rows):
            for buffer, view, held in zip(old, self._pair, moved, strict=True):
                held.copy_(buffer[row, :, window])
                view[row, :, begin:end] = held
        self._show(self._rows, begin, end)

    def _fits(self, rows: int, columns: int) -> bool:
        """Whether the memory holds so many rows and columns."""
        assert self._flat is not None
        return all(
            rows * _row(buffer, columns) <= flat.numel() for flat, buffer in zip(self._flat, self._pair, strict=True)
        )

    def _show(self, rows: int, begin: int, end: int) -> None:
        self._rows, self._begin, self._end = rows, begin, end
        self.keys, self.values = (buffer[self._first : self._first + rows, :, begin:end] for buffer in self._pair)


def _row(states: Tensor, columns: int) -> int:
    """Elements of a row of so many columns, with the heads and width of `states` [B, heads, S, d]."""
    return states.shape[1] * columns * states.shape[3]


def _view(flat: Tensor, states: Tensor, columns: int) -> Tensor:
    """Memory as rows [slots, heads, columns, d], as many as it holds, with the heads and width of `states`."""
    size = _row(states, columns)
    return flat[: flat.numel() // size * size].view(-1, states.shape[1], columns, states.shape[3])


def new_cache(space: CacheSpace, columns: int = 0) -> Cache:
    """An empty cache; transformers adds a layer when the decoder first writes to it, with at least so many columns."""
    return Cache(layer_class_to_replicate=partial(WindowLayer, space, columns))


def opened(cache: Cache, rows: int, width: int, room: int) -> Cache:
    """A cache of the next free rows of every layer, which is to be filled with `width` columns before `claim`.

    `room` is the number of free columns that are needed after them. The cache itself is unchanged for its rows, also
    where memory runs out.
    """
    layers = layers_of(cache)
    whole = max([width, *(layer.keys.shape[2] for layer in layers if layer.keys.shape[0])])
    for layer in layers:
        layer.reserve(layer.keys.shape[0] + rows, whole, room)
    return Cache(layers=[layer.opened(rows, width) for layer in layers])


def layers_of(cache: Cache) -> Sequence[WindowLayer]:
    """The layers of a cache made by `new_cache` or `opened`."""
    layers: Sequence[WindowLayer] = cache.layers
    return layers
