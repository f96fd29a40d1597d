"""Recomputing activations changes memory and time, and nothing else."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbones.recompute import recomputed_layers
from pipeline.bench.measure import operations, peak_bytes
from pipeline.bench.sizes import SIZES, every_image, make_batch, make_lmm
from pipeline.bench.step import OurStep
from pipeline.config.load import load_recipe
from pipeline.config.train import TrainConfig
from pipeline.planning import auto as fitting_module
from pipeline.planning import scaling
from pipeline.planning.auto import ESTIMATED, KEPT_FREE, POLICIES, fit_to_memory, least_for_zero2, resolve_auto
from pipeline.planning.memory_plan import plan_memory
from pipeline.planning.model_shape import meta_model
from pipeline.planning.plan import Tokens
from pipeline.planning.workload import Workload
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.world import init_world
from pipeline.sequence.engine import lmm_engine
from tests.training.worlds import KEY_WIDTH, make_recipe, make_samples, train_once


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
        assert step.module.learner["module"].prompt.grad is not None
        gradient = step.module.learner["module"].prompt.grad.clone()
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
        engine = lmm_engine(recipe, init_world(), KEY_WIDTH)
        assert engine.zero_stage == 3
        learned.append(train_once(engine, recipe, init_world(), tmp_path / policy, PromptPool(), make_samples(8)))
    torch.testing.assert_close(learned[1][1], learned[0][1])
    assert learned[0][0][-1].loss == pytest.approx(learned[1][0][-1].loss, abs=1e-6)


def test_selective_recomputes_every_second_layer() -> None:
    assert [recomputed_layers(policy, 5) for policy in ("none", "selective", "full")] == [0, 3, 5]


def test_auto_recomputes_as_little_as_fits_into_the_memory(llava: Path) -> None:
    recipe = make_recipe(llava, train__deepspeed="ds_configs/zero2.json")
    model, tokens = meta_model(recipe.model), Tokens(image=576, text=128, answer=16, source="given")
    needed, work = {}, Workload.of(recipe, KEY_WIDTH)
    for policy in POLICIES:
        train = recipe.train.model_copy(update={"checkpointing": policy})
        plan = plan_memory(work.trained_with(train), 1, model, tokens)
        needed[policy] = plan.training
    assert needed["none"] > needed["selective"] > needed["full"]

    def chosen(bytes_free: float) -> str:
        memory = int(KEPT_FREE + bytes_free / ESTIMATED)
        return fit_to_memory(work, 1, model, tokens, memory).checkpointing

    for policy in POLICIES:
        assert chosen(needed[policy] + 64) == policy
    assert chosen(needed["selective"] - 64) == "full"
    assert chosen(1) == "full"


def test_auto_is_none_on_a_cpu(llava: Path) -> None:
    recipe = make_recipe(llava)
    assert recipe.train.checkpointing == "auto"
    assert lmm_engine(recipe, init_world(), KEY_WIDTH).module.checkpointing == "none"


def test_auto_is_zero2_where_the_run_fits_into_the_memory_with_it_and_else_zero3(llava: Path) -> None:
    recipe = make_recipe(llava, train__deepspeed="auto", train__global_batch=8)
    model, tokens = meta_model(recipe.model), Tokens(image=576, text=128, answer=16, source="given")

    work = Workload.of(recipe, KEY_WIDTH)

    def chosen(memory: int) -> tuple[str, str]:
        train = fit_to_memory(work, 8, model, tokens, memory)
        return train.deepspeed, train.checkpointing

    least = least_for_zero2(work, 8, model, tokens)
    assert chosen(1 << 40) == ("ds_configs/zero2.json", "none")
    assert chosen(least + 64) == ("ds_configs/zero2.json", "full")
    assert chosen(least - 64)[0] == "ds_configs/zero3.json"
    assert chosen(1) == ("ds_configs/zero3.json", "full")


def test_auto_keeps_a_copy_of_the_weights_on_each_of_several_nodes_where_that_fits() -> None:
    recipe = load_recipe("coin_llava15_7b", ["train.global_batch=16", "train.micro_batch=1"])
    assert recipe.train.deepspeed == TrainConfig.model_fields["deepspeed"].default == "auto"
    _, model = next(scaling.models())
    work = Workload.of(recipe, scaling.KEY_WIDTH)

    def chosen(memory: int, node: int) -> str:
        return fit_to_memory(work, 16, model, scaling.TOKENS, memory, node).deepspeed

    least = least_for_zero2(work, 16, model, scaling.TOKENS)
    assert chosen(least + 64, 8) == "ds_configs/zero2.json"
    assert chosen(least - 64, 8) == "ds_configs/zero3_multinode.json"
    for node in (16, 1, 6):  # one node; nodes that differ; nodes that are not full
        assert chosen(least - 64, node) == "ds_configs/zero3.json"
    assert chosen(1, 8) == "ds_configs/zero3.json"


def test_what_is_given_is_not_chosen(llava: Path) -> None:
    recipe = make_recipe(llava, train__deepspeed="auto", train__checkpointing="selective")
    model, tokens = meta_model(recipe.model), Tokens(image=576, text=128, answer=16, source="given")
    assert fit_to_memory(Workload.of(recipe, KEY_WIDTH), 1, model, tokens, 1 << 40).checkpointing == "selective"
    fixed = make_recipe(llava, train__deepspeed="ds_configs/zero0.json")
    assert fit_to_memory(Workload.of(fixed, KEY_WIDTH), 1, model, tokens, 1).deepspeed == "ds_configs/zero0.json"


def test_auto_is_zero3_on_a_cpu(llava: Path) -> None:
    recipe = make_recipe(llava, train__deepspeed="auto")
    assert lmm_engine(recipe, init_world(), KEY_WIDTH).zero_stage == 3


def test_a_run_plans_with_the_longest_samples_and_says_what_it_chose(
    llava: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = make_recipe(llava, train__deepspeed="auto")
    samples = list(make_samples(8)[0])
    world = dataclasses.replace(init_world(), device=torch.device("cuda", 0))
    monkeypatch.setattr(fitting_module, "gpu_memory", lambda _: 1 << 40)
    with caplog.at_level("INFO"):
        train = resolve_auto(Workload.of(recipe, KEY_WIDTH), recipe.data.cuts, world, lambda: samples)
    assert (train.deepspeed, train.checkpointing) == ("ds_configs/zero2.json", "none")
    assert "ds_configs/zero2.json" in caplog.text
    assert "the longest sample read" in caplog.text
