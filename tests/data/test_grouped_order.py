"""Questions about one image stand together, and everything else an order promises still holds."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.data.grouped_order import GroupedOrder, image_groups
from pipeline.data.shards import Keys

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


def test_groups_of_one_leave_the_order_as_it_is() -> None:
    order = GroupedOrder(np.arange(16), 4, 4, seed=0, task=0)
    assert order.epoch(0).tolist() == super(GroupedOrder, order)._permute(0).tolist()


def test_equal_image_keys_are_one_group_and_samples_without_an_image_are_alone() -> None:
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    keys = Keys(image, torch.zeros(5, 2), torch.tensor([True, True, True, False, False]), {})
    groups = image_groups(keys).tolist()
    assert groups[0] == groups[2]
    assert len(set(groups)) == 4
