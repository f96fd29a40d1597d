"""The order as the ranks' loaders hand it out: every sample once per epoch, from any step on, whoever reads it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data import collate
from pipeline.data.collate import MicroBatches
from pipeline.data.order import Order
from pipeline.training.loop import loaded_steps

# Starting worker processes takes a while, and more so while other tests run.
slowly = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
Drawn = list[tuple[int, float]]


@dataclass(frozen=True)
class Bare:
    """The numbers and weights of a batch's samples, and their places in the order."""

    pairs: Drawn
    places: torch.Tensor | None = None


@pytest.fixture(autouse=True, scope="module")
def _indices_for_batches() -> Iterator[None]:
    """A batch is the numbers and weights of its samples: what a worker makes of them is not the subject."""

    def bare(examples: Any, indices: list[int], weights: list[float], selected: Any) -> Bare:
        return Bare(list(zip(indices, weights, strict=True)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collate, "collate", bare)
        yield


def drawn(order: Order, steps: int, world: int, workers: int, accumulation: int = 1, start: int = 0) -> list[Drawn]:
    """What all ranks together get in each step from `start` on, in the order of the ranks."""
    nothing: Any = None
    ranks = [
        loaded_steps(MicroBatches(nothing, order, torch.zeros(0), steps, accumulation, rank, world), workers, start)
        for rank in range(world)
    ]
    return [[pair for part in parts for batch in part for pair in batch.pairs] for parts in zip(*ranks, strict=True)]


@slowly
@given(
    count=st.integers(1, 60),
    share=st.integers(1, 3),
    world=st.integers(1, 4),
    workers=st.integers(0, 2),
    accumulation=st.integers(1, 2),
)
def test_every_sample_counts_exactly_once_per_epoch_on_any_ranks_and_workers(
    count: int, share: int, world: int, workers: int, accumulation: int
) -> None:
    order = Order(count, share * world * accumulation, seed=5, task=2)
    epochs, length = 2, order.batches_per_epoch
    steps = drawn(order, epochs * length, world, workers, accumulation)
    for epoch in range(epochs):
        part = steps[epoch * length : (epoch + 1) * length]
        assert sorted(index for step in part for index, weight in step if weight) == list(range(count))


@slowly
@given(data=st.data(), world=st.integers(1, 4), again=st.integers(1, 4), workers=st.tuples(*[st.integers(0, 2)] * 2))
def test_a_stage_goes_on_at_any_batch_on_other_ranks_and_workers(
    data: st.DataObject, world: int, again: int, workers: tuple[int, int]
) -> None:
    order = Order(data.draw(st.integers(1, 50)), 12, seed=5, task=2)  # 12: what 1 to 4 ranks divide
    steps = 2 * order.batches_per_epoch
    start = data.draw(st.integers(0, steps - 1))
    whole = drawn(order, steps, world, workers[0])
    assert drawn(order, steps, again, workers[1], start=start) == whole[start:]


def test_every_batch_of_two_epochs_can_be_gone_on_from() -> None:
    order = Order(37, 8, seed=1, task=0)
    steps = 2 * order.batches_per_epoch
    whole = drawn(order, steps, 4, 0)
    for start in range(steps):
        assert drawn(order, steps, 2, 0, start=start) == whole[start:]
