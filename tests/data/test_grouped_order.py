"""Questions about one image stand together, and everything else an order promises still holds."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.grouped_order import GroupedOrder, image_groups
from pipeline.data.keys import Keys
from pipeline.data.order import rank_slice

GROUPS = np.array([0, 1, 2, 0, 1, 3, 0, 1, 4, 0, 1, 5, 0, 6, 7, 8], dtype=np.int64)  # five of 0, four of 1


def runs(order: GroupedOrder, epoch: int) -> list[int]:
    """Lengths of the stretches of one group in an epoch."""
    groups = GROUPS[order.epoch(epoch)]
    borders = np.flatnonzero(np.diff(groups)) + 1
    return [len(part) for part in np.split(groups, borders)]


def test_samples_of_a_group_stand_side_by_side() -> None:
    order = GroupedOrder(GROUPS, 8, 4, seed=0, task=0)
    for epoch in range(5):
        assert sorted(runs(order, epoch)) == [1] * 7 + [4, 5]


def test_no_more_than_so_many_of_a_group_stand_together() -> None:
    lengths = [sorted(runs(GroupedOrder(GROUPS, 2, 4, seed, 0), 0)) for seed in range(20)]
    assert [1] * 8 + [2] * 4 in lengths  # 2 + 2 + 1 of the first group and 2 + 2 of the second, apart from each other


def test_every_sample_counts_once_per_epoch_and_epochs_differ() -> None:
    order = GroupedOrder(GROUPS, 3, 5, seed=1, task=2)
    for epoch in range(3):
        indices, weights = zip(*(order.batch(epoch, batch) for batch in range(order.batches_per_epoch)), strict=True)
        counted = np.concatenate(indices)[np.concatenate(weights) > 0]
        assert sorted(counted) == list(range(len(GROUPS)))
    assert order.epoch(0).tolist() != order.epoch(1).tolist()


def test_the_order_is_a_function_of_seed_task_and_epoch() -> None:
    orders = [GroupedOrder(GROUPS, 3, 4, seed=3, task=1) for _ in range(2)]
    orders[1].epoch(5)
    assert orders[0].epoch(2).tolist() == orders[1].epoch(2).tolist()


@given(
    groups=st.lists(st.integers(0, 12), min_size=1, max_size=120),
    together=st.integers(1, 9),
    share=st.integers(1, 5),
    world=st.integers(1, 4),
    start=st.integers(0, 40),
)
def test_any_ranks_get_every_sample_once_per_epoch_and_go_on_at_any_batch(
    groups: list[int], together: int, share: int, world: int, start: int
) -> None:
    def drawn(first: int) -> list[tuple[list[int], list[float]]]:
        """What a new process gets in two epochs from batch `first` on, all ranks together."""
        order = GroupedOrder(np.array(groups, dtype=np.int64), together, share * world, seed=5, task=2)
        found = []
        for number in range(first, 2 * order.batches_per_epoch):
            parts = [
                [part for rank in range(world) for part in rank_slice(values, rank, world).tolist()]
                for values in order.batch(*divmod(number, order.batches_per_epoch))
            ]
            found.append((parts[0], parts[1]))
        return found

    whole = drawn(0)
    length = len(whole) // 2
    for epoch in range(2):
        part = whole[epoch * length : (epoch + 1) * length]
        counted = [index for indices, weights in part for index, weight in zip(indices, weights, strict=True) if weight]
        assert sorted(counted) == list(range(len(groups)))
    first = start % len(whole)
    assert drawn(first) == whole[first:]


def test_groups_of_one_leave_the_order_as_it_is() -> None:
    order = GroupedOrder(np.arange(16), 4, 4, seed=0, task=0)
    assert order.epoch(0).tolist() == super(GroupedOrder, order)._permute(0).tolist()


def test_equal_image_keys_are_one_group_and_samples_without_an_image_are_alone() -> None:
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    keys = Keys(image, torch.zeros(5, 2), torch.tensor([True, True, True, False, False]), {})
    groups = image_groups(keys).tolist()
    assert groups[0] == groups[2]
    assert len(set(groups)) == 4
