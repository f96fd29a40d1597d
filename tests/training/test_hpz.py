"""Which ranks share a secondary copy of the weights."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.ranks.world import agreed_node_size
from pipeline.training.hpz import KEY, with_node_size


def size(value: Any, ranks: int, **env: str) -> Any:
    return with_node_size({"zero_optimization": {"stage": 3, KEY: value}}, ranks, env)["zero_optimization"][KEY]


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_auto_is_the_number_of_ranks_on_a_node(variable: str) -> None:
    assert size("auto", 16, **{variable: "4"}) == 4


def test_auto_is_off_on_one_node_and_on_unequal_nodes() -> None:
    assert size("auto", 4, LOCAL_WORLD_SIZE="4") == 1
    assert size("auto", 6, LOCAL_WORLD_SIZE="4") == 1


def test_auto_on_a_machine_without_gpus_plans_nodes_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert size("auto", 64) == 8


@pytest.mark.parametrize(("tasks", "expected"), [("4(x2)", 4), ("8", 1), ("8,4", 1)])
def test_slurm_s_own_numbers_come_before_the_devices_that_a_task_sees(
    tasks: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one device per task (--gpus-per-task) every task counts one."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert size("auto", 8, SLURM_PROCID="3", SLURM_STEP_TASKS_PER_NODE=tasks) == expected


@pytest.mark.parametrize(("sizes", "agreed"), [([8, 8, 8], 8), ([8, 8, 4], 1)])
def test_ranks_on_unequal_nodes_agree_on_none(sizes: list[int], agreed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each knows its own node only; with different groups they would wait for each other for ever."""
    monkeypatch.setattr("pipeline.ranks.world.gather_objects", lambda own: sizes)
    assert agreed_node_size() == agreed


@pytest.mark.parametrize("value", [8, 0, "all"])
def test_a_number_that_does_not_divide_the_ranks_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="the run has 12 ranks; expected 'auto'"):
        size(value, 12)


def test_a_file_without_secondary_shards_stays_as_it_is() -> None:
    assert with_node_size({"zero_optimization": {"stage": 3}}, 2, {}) == {"zero_optimization": {"stage": 3}}
