"""One low-rank update per task: trained under every ZeRO stage, resumed, evaluated, exported, answered and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.format import read_adapter
from pipeline.adapter.from_run import export
from pipeline.adapter.load import source_of
from pipeline.config.recipe import Recipe
from pipeline.errors import Interrupted, UserError
from pipeline.prompts.model import LearnerOnLMM
from pipeline.sequence.run import run_sequence
from pipeline.sequence.stage import StageTrainer, TrainedStage
from tests.e2e.conftest import MakeRecipe
from tests.joining import require_same_answers_in_any_batch
from tests.stopping import signal_in_forward

METHOD = {"name": "task_lora", "rank": 2, "alpha": 4.0}
SOFT = {**METHOD, "rule": {"name": "soft", "k": 2, "temperature": 0.05}}


def learned(recipe: Recipe, number: int) -> dict[str, torch.Tensor]:
    return load_file(recipe.run_path / "stages" / f"{number + 1:02d}-T{number}" / "prompts.safetensors")


def task_lora(make: MakeRecipe, **changes: Any) -> Recipe:
    return make(**{"method": METHOD, "tasks": 2, "train__lr_prompt": 0.05, "train__steps": 4, **changes})


@pytest.mark.parametrize("zero", [2, 3])
def test_every_zero_stage_learns_the_same_and_goes_on_bit_for_bit(make: MakeRecipe, zero: int) -> None:
    file = {"train__deepspeed": f"ds_configs/zero{zero}.json"}
    plain = task_lora(make, run_dir=str(make().run_path.parent / "plain"))
    run_sequence(plain, stages="train")
    whole = task_lora(make, run_dir=str(make().run_path.parent / "whole"), **file)
    run_sequence(whole, stages="train")
    for number in (0, 1):
        found, expected = learned(whole, number), learned(plain, number)
        assert found.keys() == expected.keys() and not any(name.startswith("head.") for name in found)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)
            if name.endswith(".b"):
                assert value.abs().sum() > 0, f"{name} learned nothing"
    stopped = task_lora(make, run_dir=str(make().run_path.parent / "stopped"), train__save_steps=1, **file)
    with signal_in_forward(LearnerOnLMM, 6), pytest.raises(Interrupted, match="after step 2 of 4"):
        run_sequence(stopped, stages="train")
    run_sequence(stopped, stages="train")
    for number in (0, 1):
        again = learned(stopped, number)
        assert all(torch.equal(again[name], value) for name, value in learned(whole, number).items())


def test_nothing_frozen_changes_and_recomputation_learns_the_same(
    make: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = StageTrainer.train

    def watched(self: StageTrainer, *given: Any) -> TrainedStage:
        weights = self.engine().module.lmm.state_dict()
        before, earlier = {name: value.clone() for name, value in weights.items()}, dict(given[2].tensors)
        trained = train(self, *given)
        assert all(torch.equal(value, before[name]) for name, value in weights.items())
        assert all(torch.equal(value, earlier[name]) for name, value in given[2].tensors.items())
        return trained

    monkeypatch.setattr(StageTrainer, "train", watched)
    kept = task_lora(make)
    run_sequence(kept, stages="train")
    recomputed = task_lora(make, train__checkpointing="full", run_dir=str(kept.run_path.parent / "recomputed"))
    run_sequence(recomputed, stages="train")
    for number in (0, 1):
        for name, value in learned(kept, number).items():
            torch.testing.assert_close(learned(recomputed, number)[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [METHOD, SOFT], ids=["hard", "soft"])
def test_a_run_is_evaluated_exported_answered_and_served_alike(
    make: MakeRecipe, tmp_path: Path, method: dict[str, Any]
) -> None:
    recipe = task_lora(make, method=method, tasks=3, train__lr_prompt=0.5)
    matrix = run_sequence(recipe)
    assert [len([x for x in row if x is not None]) for row in matrix["accuracy"]] == [1, 2, 3]
    assert set(matrix["routing"]) >= {"accuracy"}
    told = [json.loads(line) for line in (recipe.run_path / "eval" / "after-03" / "T1.jsonl").read_text().splitlines()]
    assert all(len(line["selected"]) == (1 if method is METHOD else 2) for line in told)
    assert all(("weights" in line) is (method is SOFT) for line in told)
    export(recipe.run_path, tmp_path / "adapter")
    pool, kept = read_adapter(tmp_path / "adapter").pool, source_of(recipe.run_path).pool
    assert pool.names == kept.names and all(torch.equal(pool.tensors[n], v) for n, v in kept.tensors.items())
    answerer = Answerer(source_of(tmp_path / "adapter"))
    asked = [Question(line["question"], None) for line in told] + [Question(f"task {n} asks?", None) for n in range(4)]
    require_same_answers_in_any_batch(answerer, asked, 5)
    with pytest.raises(UserError, match="updates of its layers, which prompt_embeds"):
        answerer.prompt_embeds("what?")


def test_images_are_not_shared_where_updates_change_what_they_become(make: MakeRecipe) -> None:
    with pytest.raises(UserError, match=r"evaluate\.share_images: true is not possible"):
        run_sequence(task_lora(make, tasks=1, evaluate__share_images=True))
