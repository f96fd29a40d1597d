"""What is advised where a run does not fit: the smallest change that makes it fit, by the plan itself."""

from __future__ import annotations

import pytest
from torch import nn

from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.planning.auto import fastest, fits
from pipeline.planning.memory_plan import plan_memory
from pipeline.planning.plan import GIB
from pipeline.planning.scaling import KEY_WIDTH, TOKENS, models
from pipeline.planning.smaller import smaller_settings
from pipeline.planning.workload import Workload

NODE = 8
FIXED = ("train.deepspeed=ds_configs/zero2.json", "train.checkpointing=none", "evaluate.batch=16")


@pytest.fixture(scope="module")
def seven() -> nn.Module:
    """LLaVA-1.5-7B on the meta device."""
    name, model = next(models())
    assert name == "7B"
    return model


def recipe_with(*changes: str) -> Recipe:
    return load_recipe("coin_llava15_7b", changes)


def most(model: nn.Module, gib: float, ranks: int, recipe: Recipe) -> tuple[bool, bool]:
    """Whether training and answers fit, with `auto` resolved."""
    work, memory = Workload.of(recipe, KEY_WIDTH), int(gib * GIB)
    chosen, _ = fastest(work, ranks, model, TOKENS, memory, NODE)
    plan = plan_memory(work.trained_with(chosen), ranks, model, TOKENS, NODE)
    return fits(plan.training, memory), fits(plan.evaluation, memory)


@pytest.mark.parametrize(
    ("gib", "ranks", "recipe", "expected"),
    [
        (80, 1, FIXED, {}),
        (27, 1, (*FIXED, "train.micro_batch=8"), {"train.micro_batch": 4}),
        (24, 1, (*FIXED, "train.micro_batch=4"), {"train.micro_batch": 2, "evaluate.batch": 8}),
        (18, 1, (*FIXED, "train.micro_batch=1"), {"train.checkpointing": "full", "evaluate.batch": 4}),
        (12, 1, FIXED, {"model.quantization": "nf4", "train.micro_batch": 2, "evaluate.batch": 8}),
        (6, 1, FIXED, None),
    ],
)
def test_as_little_is_changed_as_makes_it_fit(
    seven: nn.Module, gib: float, ranks: int, recipe: tuple[str, ...], expected: dict[str, str | int] | None
) -> None:
    work = Workload.of(recipe_with(*recipe), KEY_WIDTH)
    found = smaller_settings(work, ranks, seven, TOKENS, int(gib * GIB), NODE)
    assert found == expected
    if found is not None:
        changed = recipe_with(*recipe, *(f"{name}={value}" for name, value in found.items()))
        assert most(seven, gib, ranks, changed) == (True, True)


def test_answers_of_a_model_on_several_ranks_come_before_quantised_weights(seven: nn.Module) -> None:
    recipe = ("train.deepspeed=ds_configs/zero3.json", "train.checkpointing=none", "evaluate.batch=1")
    work = Workload.of(recipe_with(*recipe), KEY_WIDTH)
    found = smaller_settings(work, 8, seven, TOKENS, 14 * GIB, NODE)
    assert found is not None and found["evaluate.engine"] == "sharded" and "model.quantization" not in found
    changed = recipe_with(*recipe, *(f"{name}={value}" for name, value in found.items()))
    assert most(seven, 14, 8, recipe_with(*recipe)) != (True, True)
    assert most(seven, 14, 8, changed) == (True, True)


def test_quantised_weights_come_with_the_deepspeed_file_that_can_hold_them(seven: nn.Module) -> None:
    work = Workload.of(recipe_with("train.deepspeed=ds_configs/zero3.json"), KEY_WIDTH)
    found = smaller_settings(work, 1, seven, TOKENS, 12 * GIB, NODE)
    assert found is not None and found["model.quantization"] == "nf4"
    assert found["train.deepspeed"] == "ds_configs/zero2.json"
