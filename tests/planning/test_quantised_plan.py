"""What the memory plan makes of quantised weights: a 7B on cards of 10 and 12 GiB."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from pipeline.config.load import load_recipe
from pipeline.planning.auto import ESTIMATED, KEPT_FREE, fit_to_memory
from pipeline.planning.memory_plan import plan_memory
from pipeline.planning.model_shape import Quantised, model_shape
from pipeline.planning.plan import GIB, MemoryPlan
from pipeline.planning.scaling import KEY_WIDTH, TOKENS, models
from pipeline.planning.workload import Workload

LINEARS = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # of the decoder of a Llama 7B


@pytest.fixture(scope="module")
def seven() -> nn.Module:
    """LLaVA-1.5-7B on the meta device."""
    name, model = next(models())
    assert name == "7B"
    return model


def fitted(model: nn.Module, gib: int, *changes: str) -> tuple[str, MemoryPlan]:
    """Recomputation and plan that a card of so many GiB gets."""
    work = Workload.of(load_recipe("coin_llava15_7b", ["evaluate.batch=4", *changes]), KEY_WIDTH)
    train = fit_to_memory(work, 1, model, TOKENS, gib * GIB)
    assert train.deepspeed == "ds_configs/zero2.json"
    return train.checkpointing, plan_memory(work.trained_with(train), 1, model, TOKENS)


def test_the_weights_of_a_7b_shrink_by_those_of_its_decoder(seven: nn.Module) -> None:
    def weights(kind: str) -> int:
        settings = [f"model.quantization={kind}", "train.deepspeed=ds_configs/zero2.json"]
        work = Workload.of(load_recipe("coin_llava15_7b", settings), KEY_WIDTH)
        return plan_memory(work, 1, seven, TOKENS).bytes_of("weights")

    outputs = 32 * (4 * 4096 + 2 * 11008 + 4096)
    assert Quantised.of(model_shape(seven), "nf4") == Quantised(LINEARS, LINEARS // 2 + LINEARS // 16, 4096 * 11008)
    assert weights("none") - weights("int8") == LINEARS - 4 * outputs
    assert weights("none") - weights("nf4") == LINEARS * 2 - LINEARS // 2 - LINEARS // 16


@pytest.mark.parametrize(
    ("gib", "insertion", "batch", "expected"),
    [(12, "after_bos", 1, "none"), (12, "after_bos", 4, "full"), (10, "after_image", 4, "selective")],
)
def test_a_7b_trains_and_answers_on_a_small_card_with_nf4(
    seven: nn.Module, gib: int, insertion: str, batch: int, expected: str
) -> None:
    changes: Any = (f"method.insertion={insertion}", f"train.micro_batch={batch}")
    policy, plan = fitted(seven, gib, *changes, "model.quantization=nf4")
    assert (policy, plan.most <= (gib * GIB - KEPT_FREE) * ESTIMATED) == (expected, True)
    unquantised = fitted(seven, gib, *changes, "train.deepspeed=ds_configs/zero2.json")[1]
    assert unquantised.most > gib * GIB
