"""Every method on low-rank updates: under every ZeRO stage, resumed, evaluated, exported, answered and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.edit import merge, prune
from pipeline.adapter.format import read_adapter
from pipeline.adapter.from_run import export
from pipeline.adapter.load import source_of
from pipeline.config.recipe import Recipe
from pipeline.errors import Interrupted
from pipeline.prompts.model import LearnerOnLMM
from pipeline.sequence.run import run_sequence
from pipeline.serve.decoder import Running, RunningBatch
from tests.e2e.conftest import MakeRecipe
from tests.e2e.test_task_lora import learned
from tests.stopping import signal_in_forward

WORDS = ["embed_tokens"]
LOW_RANK = {"name": "low_rank", "rank": 2, "alpha": 4.0}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "rank": 2, "alpha": 4.0},
    "lora_merged": {"name": "lora_merged", "rank": 2, "alpha": 4.0},
    "olora": {"name": "olora", "rank": 2, "alpha": 4.0},
    "olora-own": {"name": "olora", "rank": 2, "alpha": 4.0, "forward": "own", "normalise": True},
    "moelora": {"name": "moelora", "rank": 4, "experts": 2, "alpha": 8.0},
    "moelora-factors": {"name": "moelora", "rank": 4, "experts": 2, "alpha": 8.0, "mix": "factors"},
    "hide": {"name": "hide", "rank": 2, "alpha": 4.0},
    "hide-sum": {"name": "hide", "rank": 2, "alpha": 4.0, "fuse": "sum", "route": "hard"},
    "disco": {"name": "disco", "rank": 2, "alpha": 4.0},
    "core_moe": {"name": "core_moe", "rank": 2, "alpha": 4.0},
    "ewc": {"name": "ewc", "rank": 2, "alpha": 4.0, "fisher_samples": 3},
    "lwf": {"name": "lwf", "rank": 2, "alpha": 4.0},
    "sequential": {"name": "sequential", "part": LOW_RANK},
    "independent": {"name": "independent", "part": LOW_RANK},
    "joint": {"name": "joint", "part": LOW_RANK},
    # The output layer has an update too, and the input embeddings where they can, beside those of earlier tasks.
    **{
        f"{name}-output": {"name": name, "rank": 2, "alpha": 4.0, "targets": ["v_proj", "lm_head", *words]}
        for name, words in {"moelora": [], "core_moe": [], **dict.fromkeys(("olora", "hide", "lwf"), WORDS)}.items()
    },
}
SLOW = (
    *("olora-own", "moelora-factors", "hide-sum", "disco", "sequential", "independent", "joint", "lora_merged"),
    *("moelora-output", "hide-output", "core_moe-output", "lwf-output"),
)


def some(*names: str) -> list[Any]:
    """The methods of these names, those that others stand for in the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def made(make: MakeRecipe, name: str, folder: str, **changes: Any) -> Recipe:
    given = {"method": METHODS[name], "tasks": 2, "train__lr_prompt": 0.05, "train__steps": 3, **changes}
    return make(**given, run_dir=str(make().run_path.parent / folder))


def whole_updates(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is learned, a core with its bases as one matrix: rounding may turn singular vectors of like strengths."""
    cores = [name.removeprefix("core.").removesuffix(".c") for name in values if name.startswith("core.")]
    products = {
        name: values[f"shared.core.{name}.u"] @ values[f"core.{name}.c"] @ values[f"shared.core.{name}.v"]
        for name in cores
    }
    return products or values


@pytest.mark.parametrize("name", some(*METHODS))
def test_zero_3_learns_the_same_and_goes_on_bit_for_bit(make: MakeRecipe, name: str) -> None:
    plain = made(make, name, "plain")
    run_sequence(plain, stages="train")
    file = {"train__deepspeed": "ds_configs/zero3.json", "train__save_steps": 1}
    whole, stopped = made(make, name, "whole", **file), made(make, name, "stopped", **file)
    run_sequence(whole, stages="train")
    stages = 1 if name == "joint" else 2
    with signal_in_forward(LearnerOnLMM, 2 if name == "joint" else 5), pytest.raises(Interrupted):
        run_sequence(stopped, stages="train")
    run_sequence(stopped, stages="train")
    for number in range(stages):
        if name == "joint":
            files = [run.run_path / "stages" / "01-joint" / "prompts.safetensors" for run in (whole, stopped)]
            assert files[0].read_bytes() == files[1].read_bytes()
            continue
        found, expected, again = learned(whole, number), learned(plain, number), learned(stopped, number)
        assert found.keys() == expected.keys() == again.keys()
        assert all(torch.equal(again[key], value) for key, value in found.items())
        for key, value in whole_updates(expected).items():
            torch.testing.assert_close(whole_updates(found)[key], value, atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", some(*METHODS))
def test_a_run_is_evaluated_exported_answered_and_served_alike(make: MakeRecipe, tmp_path: Path, name: str) -> None:
    recipe = made(make, name, "run", tasks=3, train__lr_prompt=0.3)
    run_sequence(recipe)
    after = recipe.run_path / "eval" / "after-03"
    lines = [json.loads(line) for line in (after / "T1.jsonl").read_text().splitlines()]
    export(recipe.run_path, tmp_path / "adapter")
    assert not any(key.startswith("memory.") for key in read_adapter(tmp_path / "adapter").pool.stacked())
    answerer = Answerer(source_of(tmp_path / "adapter"))
    told = "T1" if name == "independent" else None
    asked = [Question(line["question"], None, told) for line in lines]
    asked += [Question(f"task {n} asks?", None, told) for n in range(3)]
    answers = [answer.text for answer in answerer.answer(asked, 5)]
    assert [answerer.answer([one], 5)[0].text for one in asked] == answers
    batch, began = RunningBatch(answerer), list[Running]()
    while len(began) < len(asked) or batch.rows:
        batch.step()
        group = asked[len(began) : len(began) + 2]
        new = [Running(len(began) + place, 5) for place in range(len(group))]
        if group:
            batch.begin(answerer.route(group), new)
        began += new
    assert [row.text for row in began] == answers


def test_cores_of_several_runs_are_merged_only_in_the_same_bases(make: MakeRecipe, tmp_path: Path) -> None:
    recipe = made(make, "core_moe", "run")
    run_sequence(recipe, stages="train")
    export(recipe.run_path, tmp_path / "both")
    prune(tmp_path / "both", ["T1"], tmp_path / "first")
    prune(tmp_path / "both", ["T0"], tmp_path / "second")
    merge([tmp_path / "first", tmp_path / "second"], tmp_path / "merged")
    pools = [read_adapter(tmp_path / name).pool for name in ("both", "merged")]
    assert pools[0].names == pools[1].names and pools[0].shared.keys() == pools[1].shared.keys()
    assert all(torch.equal(pools[1].shared[name], value) for name, value in pools[0].shared.items())
    other = made(make, "core_moe", "other", seed=5)
    run_sequence(other, stages="train")
    export(other.run_path, tmp_path / "theirs")
    prune(tmp_path / "theirs", ["T0"], tmp_path / "foreign")
    with pytest.raises(Exception, match="have other tensors in common"):
        merge([tmp_path / "first", tmp_path / "foreign"], tmp_path / "none")
