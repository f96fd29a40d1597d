"""The tensors of a decoding batch: rows are appended, removed, and parked in host memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from pipeline.backbones.kv_cache import CacheSpace, layers_of, new_cache, opened
from pipeline.data.selection import NO_SET, Selection


@dataclass(frozen=True)
class ParkedState:
    """A `DecodingState` in host memory."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values [B, heads, S, d]
    attention: Tensor  # [B, S]
    positions: Tensor  # [B]
    last: Tensor  # [B]
    selection: Selection | None
    inserted: Tensor | None  # [B, S]

    def part(self, rows: slice) -> ParkedState:
        """The state of these rows."""
        layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        index = torch.arange(len(self.last))[rows]
        selection = None if self.selection is None else self.selection.rows(index)
        inserted = None if self.inserted is None else self.inserted[rows]
        return ParkedState(layers, self.attention[rows], self.positions[rows], self.last[rows], selection, inserted)

    def on(self, device: torch.device, cache: Cache) -> DecodingState:
        """The state on a device; its keys and values are written to the cache."""
        for number, (keys, values) in enumerate(self.layers):
            cache.update(keys.to(device), values.to(device), number)
        selection = None if self.selection is None else self.selection.to(device)
        inserted = None if self.inserted is None else self.inserted.to(device)
        return DecodingState(
            cache, self.attention.to(device), self.positions.to(device), self.last.to(device), selection, inserted
        )


@dataclass
class DecodingState:
    """Keys and values of B rows, and the other tensors that their next tokens depend on.

    All rows end in the last column of the cache; shorter rows are padded on the left.
    """

    cache: Cache
    attention: Tensor  # [B, S] 1: a token, 0: padding or a gap
    positions: Tensor  # [B] of each row's next token
    last: Tensor  # [B] each row's newest token
    selection: Selection | None = None  # each row's modules, where modules act on the decoder
    inserted: Tensor | None = None  # [B, S] number from 1 of the inserted row at each column, where modules need it

    @classmethod
    def empty(cls, device: torch.device, space: CacheSpace) -> DecodingState:
        """A state without rows."""
        none = torch.zeros(0, dtype=torch.long, device=device)
        return cls(new_cache(space), none[:, None][:, :0], none, none)

    def __len__(self) -> int:
        return len(self.positions)

    def opened(self, space: CacheSpace, rows: int, width: int, room: int) -> Cache:
        """A cache for `rows` further rows, to be filled with `width` columns and handed to `append` in a state.

        There are `room` free columns after them. If memory runs out, here or while it is filled, this state is
        unchanged.
        """
        return opened(self.cache, rows, width, room) if layers_of(self.cache) else new_cache(space, width + room)

    def append(self, other: DecodingState) -> None:
        """Add the rows of a state whose keys and values are in a cache of `opened`."""
        rows, added = len(other), other.attention.shape[1]
        width = max(self.attention.shape[1], added)
        if len(self):
            other = DecodingState(
                self.cache,
                torch.cat([_widened(self.attention, width), _widened(other.attention, width)]),
                torch.cat([self.positions, other.positions]),
                torch.cat([self.last, other.last]),
                _joined(self.selection, other.selection),
                _stacked(self.inserted, other.inserted, width),
            )
        if not layers_of(self.cache):
            self.cache = other.cache
        else:
            for layer in layers_of(self.cache):
                layer.claim(rows, added)
        self.attention, self.positions, self.last = other.attention, other.positions, other.last
        self.selection, self.inserted = other.selection, other.inserted

    def keep(self, kept: list[int]) -> list[int]:
        """Keep these rows, in ascending order; returns the new order of the rows.

        In place: the last rows are copied over removed ones, so no cache memory is allocated.
        """
        staying = set(kept)
        holes = [number for number in range(len(kept)) if number not in staying]
        movers = [number for number in kept if number >= len(kept)]
        order = list(range(len(kept)))
        for source, target in zip(movers, holes, strict=True):
            order[target] = source
            for layer in layers_of(self.cache):
                layer.move(source, target)
        index = torch.tensor(order, dtype=torch.long, device=self.attention.device)
        attention = self.attention[index]
        # Columns before it are padding in every remaining row.
        first = int(attention.any(0).float().argmax()) if kept else attention.shape[1]
        self.attention, self.positions, self.last = attention[:, first:], self.positions[index], self.last[index]
        self.selection = None if self.selection is None else self.selection.rows(index)
        self.inserted = None if self.inserted is None else self.inserted[index][:, first:]
        for layer in layers_of(self.cache):
            layer.narrow(len(kept), first)
        return order

    def parked(self, first: int) -> ParkedState:
        """Copy the rows from `first` on to host memory."""
        host = torch.device("cpu")
        layers = [layer.taken(first) for layer in layers_of(self.cache)]
        attention, positions, last = (
            part[first:].to(host, copy=True) for part in (self.attention, self.positions, self.last)
        )
        selection = None
        if self.selection is not None:
            selection = self.selection.rows(torch.arange(first, len(self), device=self.last.device)).to(host)
        inserted = None if self.inserted is None else self.inserted[first:].to(host, copy=True)
        return ParkedState(layers, attention, positions, last, selection, inserted)

    def release(self) -> None:
        """Free the unused memory of the cache."""
        layers = layers_of(self.cache)
        if layers and not len(self):
            self.cache = new_cache(layers[0].space)
            return
        for layer in layers:
            layer.release()


def _widened(attention: Tensor, width: int) -> Tensor:
    """Pad an attention mask [B, S] on the left with zeros to `width` columns."""
    return pad(attention, (width - attention.shape[1], 0))


def _stacked(first: Tensor | None, second: Tensor | None, width: int) -> Tensor | None:
    """Row numbers [B, S] of both, each padded on the left; rows that have none have none inserted."""
    if first is None or second is None:
        return None
    return torch.cat([_widened(first, width), _widened(second, width)])


def _joined(first: Selection | None, second: Selection | None) -> Selection | None:
    """Concatenate two selections by rows; the narrower one is padded on the right."""
    if first is None or second is None:
        return None
    width = max(first.width, second.width)
    return Selection.joined([_filled_up(part, width) for part in (first, second)])


def _filled_up(selection: Selection, width: int) -> Selection:
    more = (0, width - selection.width)
    weights = None if selection.weights is None else pad(selection.weights, more)
    return Selection(pad(selection.numbers, more, value=NO_SET), weights)
