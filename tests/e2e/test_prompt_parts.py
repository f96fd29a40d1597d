"""Rows of every layer, prefixes and pools of prompts in whole runs: every ZeRO stage, resumed, exported, served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.edit import prune
from pipeline.adapter.format import read_adapter
from pipeline.adapter.from_run import export
from pipeline.adapter.load import source_of
from pipeline.config.recipe import Recipe
from pipeline.errors import Interrupted, UserError
from pipeline.prompts.model import LearnerOnLMM
from pipeline.sequence.run import run_sequence
from tests.e2e.conftest import MakeRecipe
from tests.joining import require_same_answers_in_any_batch
from tests.stopping import signal_in_forward

METHODS: dict[str, dict[str, Any]] = {
    "modular": {"name": "modular", "prompt_length": 2, "k": 2, "gate": None, "depth": 2, "add": 2, "remove": 1},
    "dualprompt": {"name": "dualprompt", "general_layers": [0], "task_layers": [0, 1], "preset": "coda"},
    "coda": {"name": "coda", "components": 2, "component_length": 2, "layers": [0, 1]},
    "l2p": {"name": "l2p", "pool_size": 4, "pool_length": 2, "chosen": 2},
    "prefix": {"name": "sequential", "part": {"name": "prefix", "prefix_length": 3}},
    "deep": {"name": "sequential", "part": {"name": "deep", "prompt_length": 2, "depth": 2}},
}
EVERY_ZERO = [pytest.param(zero, name, marks=[pytest.mark.slow] * (zero == 2)) for zero in (3, 2) for name in METHODS]


def learned(recipe: Recipe, number: int) -> dict[str, torch.Tensor]:
    return load_file(recipe.run_path / "stages" / f"{number + 1:02d}-T{number}" / "prompts.safetensors")


def recipe_of(make: MakeRecipe, name: str, **changes: Any) -> Recipe:
    folder = make().run_path.parent / changes.pop("run", "run")
    fields = {"method": METHODS[name], "tasks": 2, "train__lr_prompt": 0.02, "train__steps": 4, "run_dir": str(folder)}
    return make(**{**fields, **changes})


@pytest.mark.parametrize(("zero", "name"), EVERY_ZERO)
def test_every_zero_stage_learns_the_same_and_goes_on_bit_for_bit(make: MakeRecipe, zero: int, name: str) -> None:
    file = {"train__deepspeed": f"ds_configs/zero{zero}.json"}
    plain = recipe_of(make, name, run="plain", train__deepspeed="ds_configs/zero0.json")
    run_sequence(plain, stages="train")
    whole = recipe_of(make, name, run="whole", train__checkpointing="full", **file)
    run_sequence(whole, stages="train")
    for number in (0, 1):
        found, expected = learned(whole, number), learned(plain, number)
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            torch.testing.assert_close(found[tensor], value, atol=2e-3, rtol=1e-2, msg=tensor)
    stopped = recipe_of(make, name, run="stopped", train__checkpointing="full", train__save_steps=1, **file)
    with signal_in_forward(LearnerOnLMM, 6), pytest.raises(Interrupted, match="after step 2 of 4"):
        run_sequence(stopped, stages="train")
    run_sequence(stopped, stages="train")
    for number in (0, 1):
        again = learned(stopped, number)
        assert all(torch.equal(again[tensor], value) for tensor, value in learned(whole, number).items())


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_evaluated_exported_answered_and_served_alike(make: MakeRecipe, tmp_path: Path, name: str) -> None:
    recipe = recipe_of(make, name, tasks=3, train__lr_prompt=0.3)
    matrix = run_sequence(recipe)
    assert [len([x for x in row if x is not None]) for row in matrix["accuracy"]] == [1, 2, 3]
    told = [json.loads(line) for line in (recipe.run_path / "eval" / "after-03" / "T1.jsonl").read_text().splitlines()]
    export(recipe.run_path, tmp_path / "adapter")
    pool, kept = read_adapter(tmp_path / "adapter").pool, source_of(recipe.run_path).pool
    assert pool.names == kept.names and all(torch.equal(pool.tensors[n], v) for n, v in kept.tensors.items())
    assert pool.common.keys() == kept.common.keys()
    assert all(torch.equal(pool.common[n], value) for n, value in kept.common.items())
    answerer = Answerer(source_of(tmp_path / "adapter"))
    asked = [Question(line["question"], None) for line in told] + [Question(f"task {n} asks?", None) for n in range(4)]
    require_same_answers_in_any_batch(answerer, asked, 5)
    if name in ("modular", "dualprompt"):
        prune(tmp_path / "adapter", ["T1"], tmp_path / "pruned")
        assert Answerer(source_of(tmp_path / "pruned")).answer(asked[:1], 5)[0].text


@pytest.mark.parametrize("name", ["modular", "dualprompt", "coda"])
def test_images_are_not_shared_where_modules_change_what_they_become(make: MakeRecipe, name: str) -> None:
    with pytest.raises(UserError, match=r"evaluate\.share_images: true is not possible"):
        run_sequence(recipe_of(make, name, tasks=1, evaluate__share_images=True))


def test_rows_behind_the_image_share_it(make: MakeRecipe) -> None:
    method = {**METHODS["modular"], "insertion": "after_image"}
    matrix = run_sequence(recipe_of(make, "modular", method=method, evaluate__share_images=True))
    assert matrix["accuracy"][1][0] is not None


def test_what_the_model_cannot_carry_is_refused_before_anything_is_trained(make: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"depth of 3 reaches beyond the decoder, which has 2 layers"):
        run_sequence(recipe_of(make, "modular", method={**METHODS["modular"], "depth": 3}))
    with pytest.raises(UserError, match=r"task_layers names layer 5; the decoder has 2 layers"):
        run_sequence(recipe_of(make, "dualprompt", run="2", method={**METHODS["dualprompt"], "task_layers": [5]}))
    flash = {"model__attn_implementation": "flash_attention_2"}
    for name in ("modular", "dualprompt", "coda", "prefix"):
        with pytest.raises(UserError, match=r"with attention 'flash_attention_2', .* expected sdpa or eager"):
            run_sequence(recipe_of(make, name, run=name, **flash))
