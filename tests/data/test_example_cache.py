"""Examples are kept where all of a data set fit, else none of them."""

from __future__ import annotations

import torch

from pipeline.data.example import Example
from pipeline.data.example_cache import ExampleCache


def example(values: int) -> Example:
    return Example("s", [1], [], {"pixel_values": torch.zeros(values)})


def test_a_small_data_set_is_kept_whole() -> None:
    cache = ExampleCache(count=3, limit=10_000)
    for index in range(3):
        cache.put(index, example(100))
    assert all(cache.get(index) is not None for index in range(3))


def test_nothing_of_a_data_set_that_is_larger_than_the_cache_is_kept() -> None:
    cache = ExampleCache(count=1000, limit=10_000)
    cache.put(0, example(100))
    assert cache.get(0) is None
    assert cache.bytes == 0


def test_a_data_set_that_turns_out_to_be_larger_is_let_go() -> None:
    cache = ExampleCache(count=100, limit=10_000)
    cache.put(0, example(2))
    assert cache.get(0) is not None
    cache.put(1, example(1000))
    assert cache.get(0) is None
    cache.put(2, example(1))
    assert cache.get(2) is None


def test_samples_that_are_asked_for_once_are_not_kept() -> None:
    cache = ExampleCache(count=0)
    cache.put(0, example(1))
    assert cache.get(0) is None
