"""Traffic and time of a step on paper."""

from __future__ import annotations

import pytest

from pipeline.planning.scaling import Hardware, step

WEIGHTS, TRAINED = 1000.0, 8.0


def test_one_node_sends_nothing_to_another() -> None:
    one = step(WEIGHTS, 500, TRAINED, ranks=8, node=8, hpz=False, tokens=10)
    assert one.between == 0
    assert one.within == pytest.approx(2 * WEIGHTS * 7 / 8 + 2 * TRAINED * 7 / 8)


def test_without_secondary_shards_the_weights_enter_every_node_twice_a_step() -> None:
    found = step(WEIGHTS, 500, TRAINED, ranks=16, node=8, hpz=False, tokens=10)
    assert found.between == pytest.approx(2 * WEIGHTS * 15 / 16 + 2 * TRAINED * 15 / 16)


def test_with_secondary_shards_only_the_trainables_do() -> None:
    found = step(WEIGHTS, 500, TRAINED, ranks=512, node=8, hpz=True, tokens=10)
    assert found.between == pytest.approx(2 * TRAINED * 511 / 512)


def test_the_time_lies_between_full_overlap_and_none() -> None:
    found = step(WEIGHTS, 500, 0.0, ranks=16, node=8, hpz=False, tokens=10)
    best, worst = found.seconds(Hardware(flops=20_000, within=1875, between=625))
    assert (best, worst) == pytest.approx((3.0, 1.0 + 1.0 + 3.0))
