"""Gradients of a bfloat16 model are summed and sent in float32, by DeepSpeed itself."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.ranks.world import init_world
from pipeline.training.deepspeed_config import deepspeed_file, with_recipe
from pipeline.training.engine import start_deepspeed

STEPS = 64
SMALL = 2.0**-9  # half of what bfloat16 can still add to 1


class Weighted(nn.Module):
    """Its gradient is what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))

    def forward(self, factor: float) -> Tensor:
        return self.weight.float().sum() * factor


def engine(name: str, dtype: str = "bfloat16", **more: Any) -> Any:
    """DeepSpeed's engine with a shipped file, accumulating `STEPS` micro-batches; a step moves weights by gradients."""
    init_world()
    module = Weighted()
    config = {**deepspeed_file(f"ds_configs/{name}.json"), **more}
    config.get("zero_optimization", {}).pop("zero_hpz_partition_size", None)
    return start_deepspeed().initialize(
        model=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=1.0),
        config=with_recipe(config, 1, STEPS, None, dtype),
        dist_init_required=False,
    )[0]


def step(built: Any) -> float:
    """What one step with the gradients 1 and then always `SMALL` adds up to."""
    from deepspeed.utils import safe_get_full_fp32_param

    for number in range(STEPS):
        built.backward(built(1.0 if number == 0 else SMALL))
        built.step()
    return -float(safe_get_full_fp32_param(built.module.weight)[0]) * STEPS


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_small_gradients_are_not_lost_beside_a_large_one(name: str) -> None:
    assert step(engine(name)) == pytest.approx(1 + (STEPS - 1) * SMALL, rel=1e-6)


@pytest.mark.parametrize("name", ["zero0", "zero2", "zero3", "zero3_offload", "zero3_multinode"])
def test_they_are_sent_in_float32(name: str) -> None:
    config = with_recipe(deepspeed_file(f"ds_configs/{name}.json"), 1, 1, None, "bfloat16")
    assert config["communication_data_type"] == "fp32"
    assert (
        with_recipe(deepspeed_file(f"ds_configs/{name}.json"), 1, 1, None, "float32")
        .keys()
        .isdisjoint(("communication_data_type", "data_types"))
    )


def test_deepspeed_takes_it_without_zero_too() -> None:
    assert engine("zero0").communication_data_type == torch.float32


def test_a_file_that_says_otherwise_is_heeded() -> None:
    built = engine("zero2", communication_data_type="bf16", data_types={"grad_accum_dtype": "bf16"})
    assert built.communication_data_type == torch.bfloat16
    assert step(built) == pytest.approx(1, rel=1e-6)


def test_deepspeed_says_nothing_of_optimizers_that_it_does_not_list(caplog: pytest.LogCaptureFixture) -> None:
    """As the benchmarks' SGD; what else it warns of is shown."""
    with caplog.at_level(logging.WARNING, "DeepSpeed"):
        engine("zero2")
        logger = logging.getLogger("DeepSpeed")
        for line in ("**** You are using ZeRO with an untested optimizer, proceed with caution *****", "something new"):
            logger.handle(logger.makeRecord("DeepSpeed", logging.WARNING, "", 0, line, (), None))
    assert "untested" not in caplog.text and "something new" in caplog.text
