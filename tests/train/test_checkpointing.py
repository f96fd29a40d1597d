"""Recomputing activations changes memory and time, and nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbones.recompute import recomputed_layers
from pipeline.bench.measure import operations, peak_bytes
from pipeline.bench.sizes import SIZES, every_image, make_batch, make_lmm
from pipeline.bench.step import OurStep
from pipeline.distributed import init_world
from pipeline.engine import Engine
from pipeline.fitting import ESTIMATED, KEPT_FREE, POLICIES, fitting_policy
from pipeline.memory import Tokens, plan_memory
from pipeline.model_shape import meta_model
from pipeline.prompts.pool import PromptPool
from tests.train.worlds import KEY_WIDTH, make_recipe, make_samples, train_once


@pytest.mark.parametrize("insertion", ["after_bos", "after_image"])
def test_gradients_are_the_same_and_more_memory_is_left(insertion: str) -> None:
    size = SIZES["tiny"]
    sets = torch.randn(4, size.prompt_length, size.width, generator=torch.Generator().manual_seed(0))
    lmm = make_lmm(size, layers=6)
    batch = every_image(make_batch(size, 4, 1, 3))
    found: dict[str, Any] = {}
    for policy in ("none", "selective", "full"):
        torch.manual_seed(0)  # of the head
        step = OurStep(lmm, size, sets[:-1], sets[-1], insertion)
        step.module.checkpointing = policy
        step(batch)
        assert step.module.prompt.grad is not None
        gradient = step.module.prompt.grad.clone()
        found[policy] = gradient, peak_bytes(partial(step, batch)), operations(partial(step, batch))[0]
    for policy in ("selective", "full"):
        torch.testing.assert_close(found[policy][0], found["none"][0])
    memory, work = ([found[policy][kind] for policy in ("none", "selective", "full")] for kind in (1, 2))
    assert memory == sorted(memory, reverse=True) and memory[0] > memory[2]
    assert work == sorted(work) and work[0] < work[2]


def test_a_stage_under_zero3_learns_the_same_with_recomputed_layers(llava: Path, tmp_path: Path) -> None:
    learned = []
    for policy in ("none", "full"):
        recipe = make_recipe(llava, train__checkpointing=policy)
        engine = Engine(recipe, init_world(), KEY_WIDTH)
        assert engine.zero_stage == 3
        learned.append(train_once(engine, recipe, init_world(), tmp_path / policy, PromptPool(), make_samples(8)))
    torch.testing.assert_close(learned[1][1], learned[0][1])
    assert learned[0][0][-1].loss == pytest.approx(learned[1][0][-1].loss, abs=1e-6)


def test_selective_recomputes_every_second_layer() -> None:
    assert [recomputed_layers(policy, 5) for policy in ("none", "selective", "full")] == [0, 3, 5]


def test_auto_recomputes_as_little_as_fits_into_the_memory(llava: Path) -> None:
    recipe = make_recipe(llava, train__deepspeed="ds_configs/zero2.json")
    model, tokens = meta_model(recipe), Tokens(image=576, text=128, answer=16, source="given")
    needed = {}
    for policy in POLICIES:
        train = recipe.train.model_copy(update={"checkpointing": policy})
        plan = plan_memory(recipe.model_copy(update={"train": train}), 1, KEY_WIDTH, model, tokens)
        needed[policy] = plan.training
    assert needed["none"] > needed["selective"] > needed["full"]

    def chosen(bytes_free: float) -> str:
        return fitting_policy(recipe, 1, KEY_WIDTH, model, tokens, int(KEPT_FREE + bytes_free / ESTIMATED))

    for policy in POLICIES:
        assert chosen(needed[policy] + 64) == policy
    assert chosen(needed["selective"] - 64) == "full"
    assert chosen(1) == "full"


def test_auto_is_none_on_a_cpu(llava: Path) -> None:
    recipe = make_recipe(llava)
    assert recipe.train.checkpointing == "auto"
    assert Engine(recipe, init_world(), KEY_WIDTH).module.checkpointing == "none"
