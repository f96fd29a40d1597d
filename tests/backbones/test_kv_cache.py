"""The cache of a decoding batch: rows join and leave within memory that is allocated once, and do not change others."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.backbones.kv_cache import ROOM, CacheSpace, WindowLayer, layers_of, new_cache, opened

HEADS, SIZE, LAYERS = 2, 3, 2


class Rows:
    """A cache with what its rows hold, as lists of columns; each value is drawn once, so that none is like another."""

    def __init__(self, space: CacheSpace) -> None:
        self.space, self.cache = space, new_cache(space, 28)
        self.held: list[list[Tensor]] = []  # by row, its columns [2, layers, heads, d]

    def join(self, widths: list[int], room: int = 8) -> None:
        """Rows of these widths join together, padded on the left."""
        width = max(widths)
        joining = opened(self.cache, len(widths), width, room) if layers_of(self.cache) else self.cache
        states = torch.randn(len(widths), width, 2, LAYERS, HEADS, SIZE)
        for number in range(LAYERS):
            keys, values = (states[:, :, part, number].transpose(1, 2) for part in range(2))
            found = joining.update(keys, values, number)
            assert torch.equal(found[0], keys) and torch.equal(found[1], values)
        if joining is not self.cache:
            for layer in layers_of(self.cache):
                layer.claim(len(widths), width)
        self.held += [list(row[width - own :]) for row, own in zip(states, widths, strict=True)]
        self.check()

    def step(self) -> None:
        """Every row gets a token."""
        states = torch.randn(len(self.held), 2, LAYERS, HEADS, SIZE)
        for number in range(LAYERS):
            self.cache.update(states[:, 0, number, :, None], states[:, 1, number, :, None], number)
        for row, token in zip(self.held, states, strict=True):
            row.append(token)
        self.check()

    def leave(self, place: int) -> None:
        """A row leaves; the last one takes its place."""
        last, width = len(self.held) - 1, layers_of(self.cache)[0].keys.shape[2]
        self.held[place] = self.held[last]
        del self.held[last]
        for layer in layers_of(self.cache):
            layer.move(last, place)
            layer.narrow(last, width - max(map(len, self.held), default=0))
        self.check()

    def check(self) -> None:
        """What the window shows is what the rows hold, behind columns that masks hide and that are finite."""
        for number, layer in enumerate(layers_of(self.cache)):
            assert len(layer.keys) == len(layer.values) == len(self.held)
            for place, row in enumerate(self.held):
                expected = torch.stack(row, dim=3)[:, number]  # [2, heads, S, d]
                for part, found in zip(expected, (layer.keys[place], layer.values[place]), strict=True):
                    assert torch.equal(found[:, -len(row) :], part) and found.isfinite().all()


@pytest.fixture(autouse=True)
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated holds NaN, the worst that may have been there."""
    empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda *given, **named: empty(*given, **named).fill_(torch.nan))


@pytest.mark.parametrize("seed", range(4))
def test_rows_keep_what_they_hold_whoever_joins_and_leaves_at_every_step(seed: int) -> None:
    torch.manual_seed(seed)
    chance = random.Random(seed)
    rows = Rows(CacheSpace(slots=chance.choice([0, 4, 9]), whole=True))
    for _ in range(30):
        if not rows.held or (len(rows.held) < 9 and chance.random() < 0.5):
            rows.join([chance.randint(1, 90) for _ in range(chance.randint(1, 3))], chance.randint(1, 40))
        for _ in range(chance.randint(0, 4)):
            if rows.held:
                rows.step()
        while rows.held and chance.random() < 0.5:
            rows.leave(chance.randrange(len(rows.held)))


def test_memory_for_the_batch_is_allocated_once() -> None:
    rows = Rows(CacheSpace(slots=6, whole=True))
    rows.join([20])
    held, place = rows.space.nbytes, layers_of(rows.cache)[0].keys.untyped_storage().data_ptr()
    assert held == 2 * LAYERS * 6 * HEADS * ROOM * SIZE * 4
    for number in range(200):
        rows.step()
        longest = max(rows.held, key=len)
        if len(longest) > 35:
            rows.leave(next(place for place, row in enumerate(rows.held) if row is longest))
        if number % 3 == 2:
            rows.join([20])
    layer = layers_of(rows.cache)[0]
    assert (rows.space.nbytes, rows.space.peak, layer.keys.untyped_storage().data_ptr()) == (held, held, place)


def test_longer_rows_take_the_memory_of_free_slots() -> None:
    rows = Rows(CacheSpace(slots=9, whole=True))
    rows.join([20, 10])
    held = rows.space.nbytes
    rows.join([3 * ROOM - 8])
    assert layers_of(rows.cache)[0].keys.shape[2] == 3 * ROOM - 8 and rows.space.peak == held
    rows.leave(2)
    rows.join([10, 10, 10])  # the columns of the longest row become slots again
    assert rows.space.peak == held


def test_where_memory_is_enlarged_one_layer_exists_twice() -> None:
    rows = Rows(CacheSpace())
    rows.join([40])
    before = rows.space.nbytes
    rows.join([40])
    assert rows.space.nbytes == 2 * before
    assert rows.space.peak == 2 * before + before // LAYERS


def test_no_more_tokens_are_allocated_than_allowed() -> None:
    rows = Rows(CacheSpace(slots=64, most=150, whole=True))
    rows.join([20])
    assert rows.space.nbytes == 2 * LAYERS * HEADS * SIZE * 4 * 2 * ROOM  # two slots of 64 columns
    rows.join([30, 30])  # 38 columns each, of at most 50
    assert rows.space.nbytes <= 150 * 2 * LAYERS * HEADS * SIZE * 4


@pytest.mark.parametrize("most", range(4))
def test_rows_are_unchanged_where_memory_runs_out_while_they_are_moved(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    rows = Rows(CacheSpace())
    rows.join([40, 30])
    rows.step()
    plain, left = Tensor.new_empty, iter(range(most))

    def failing(*given: Any, **named: Any) -> Tensor:
        if next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "new_empty", failing)
        with pytest.raises(torch.OutOfMemoryError):
            opened(rows.cache, 3, 50, 8)
    rows.check()
    rows.step()
    rows.join([50, 1, 2])


def test_released_memory_is_that_of_the_window() -> None:
    rows = Rows(CacheSpace(slots=8))
    rows.join([40, 30])
    for layer in layers_of(rows.cache):
        layer.release()
    assert rows.space.nbytes == 2 * LAYERS * HEADS * SIZE * 4 * 2 * 40
    rows.check()
    rows.step()
    rows.join([50])


def test_a_layer_without_tokens_has_no_memory() -> None:
    space = CacheSpace(slots=4)
    assert WindowLayer(space).nbytes == space.nbytes == space.peak == 0
