"""The benchmarks compare like with like: the same loss in the same layout, every operation and byte counted."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from pipeline.backbones.packing import Packed
from pipeline.bench import measure, switches
from pipeline.bench.__main__ import app
from pipeline.bench.evaluate import bench_evaluate
from pipeline.bench.gpu import _measured, bench_gpu
from pipeline.bench.keys import bench_keys
from pipeline.bench.loader import bench_loader
from pipeline.bench.low_rank import bench_low_rank
from pipeline.bench.sizes import SIZES, every_image, make_batch
from pipeline.bench.step import bench_step
from pipeline.bench.switches import SWITCHES, bench_switches, mixed_batch, why_no_flash
from pipeline.bench.tasks import SetsInUse, bench_tasks
from pipeline.errors import UserError
from pipeline.sequence.run import run_sequence
from tests.backbones.flash_on_cpu import use_flash_on_cpu
from tests.e2e.conftest import prepare_project, recipe_on


@pytest.fixture(scope="module")
def step() -> dict[str, Any]:
    return bench_step("tiny", samples=4, rounds=1, variants=("reference", "peft", "after_bos", "after_image_shared"))


def test_the_reference_computes_our_loss_in_our_layout(step: dict[str, Any]) -> None:
    assert step["agreement"]["difference"] < 1e-5
    assert step["agreement"]["reference"] > 1


def test_ours_takes_fewer_operations_and_least_where_questions_share_an_image(step: dict[str, Any]) -> None:
    needed = {name: row["gflop_per_sample"] for name, row in step["variants"].items()}
    assert needed["reference"] > needed["after_bos"] > needed["after_image_shared"] > 0
    assert step["ratios"]["reference"]["after_bos"]["operations"] > 1.5


def test_peft_takes_more_operations_and_memory_than_ours(step: dict[str, Any]) -> None:
    assert step["ratios"]["peft"]["after_bos"]["operations"] > 1.5
    assert step["ratios"]["peft"]["after_bos"]["peak_memory"] > 1


def test_operations_of_products_and_attention_are_counted() -> None:
    weights = torch.ones(3, 5)
    assert measure.operations(lambda: torch.ones(2, 3) @ weights) == (2 * 2 * 3 * 5, 0)
    query = torch.ones(1, 2, 7, 4)
    attend = nn.functional.scaled_dot_product_attention
    found = 2 * (2 * 2 * 7 * 7 * 4)
    assert measure.operations(lambda: attend(query, query, query)) == (found, found)


def test_peak_memory_counts_what_lives_at_once_and_what_was_held_before() -> None:
    mib = torch.zeros(measure.MIB // 4)

    def two_then_one() -> None:
        first = mib + 1
        second = first + 1
        del first
        _ = second + 1  # with `second`, the second pair

    assert measure.peak_bytes(two_then_one) == 2 * measure.MIB
    assert measure.peak_bytes(two_then_one, {"held": mib}) == 3 * measure.MIB


def test_a_shared_batch_has_each_image_once() -> None:
    batch = make_batch(SIZES["tiny"], 5, per_image=2)
    assert len(batch.images["pixel_values"]) == 3
    assert every_image(batch).images["pixel_values"][1].equal(batch.images["pixel_values"][0])


def test_low_rank_modules_of_a_thousand_tasks_take_the_operations_of_eight() -> None:
    found = bench_low_rank("tiny", many=256, samples=1, rounds=1)
    for kind in ("step", "answer"):
        assert found["ratios"]["8 tasks"][kind]["operations"] < 1.05
        assert found["ratios"]["one module"][kind]["operations"] > 1  # eight are computed, not one


def test_a_thousand_tasks_take_no_more_operations_and_only_the_memory_of_their_sets() -> None:
    found = bench_tasks("tiny", few=8, many=1024, samples=1, rounds=1, use=SetsInUse(router="prototype"))
    for kind in ("step", "answer"):
        assert found["ratios"]["8 tasks"][kind]["operations"] < 1.05
    assert 120 < found["adapter_bytes"]["1024"] / found["adapter_bytes"]["8"] < 130
    peak = {name: row["peak_mib"] * measure.MIB for name, row in found["variants"].items()}
    pool = found["adapter_bytes"]["1024"] - found["adapter_bytes"]["8"]  # sets and prototypes in float32
    assert peak["step, 1024 tasks"] - peak["step, 8 tasks"] < 1.05 * pool + 0.1 * measure.MIB
    assert peak["answer, 1024 tasks"] - peak["answer, 8 tasks"] < 0.5 * pool  # the sets stay in their file


def test_kept_keys_stay_in_their_file_and_what_is_made_of_them_is_counted() -> None:
    found = bench_tasks("tiny", few=4, many=64, samples=1, rounds=1, use=SetsInUse(router="random_ridge"))
    few, many = found["router"]["4"], found["router"]["64"]
    assert found["router_name"] == "random_ridge"
    assert many["kept_keys_mib"] == pytest.approx(16 * few["kept_keys_mib"], rel=0.05)
    assert many["made_mib"] < many["kept_keys_mib"]
    peak = {name: row["peak_mib"] for name, row in found["variants"].items()}
    assert peak["answer, 64 tasks"] - peak["answer, 4 tasks"] < many["made_mib"] + 0.1 < many["kept_keys_mib"]
    assert found["ratios"]["4 tasks"]["answer"]["operations"] < 1.05


def test_reading_by_index_is_told_against_sequential_reading() -> None:
    found = bench_loader(samples=12, rounds=1)
    assert found["samples"] == 12
    assert all(row["samples_per_s"] > 0 for row in found["variants"].values())
    assert found["ratios"]["sequential"].keys() == {"indexed", "permuted"}


def test_the_share_of_the_towers_is_what_they_took_of_the_whole() -> None:
    found = bench_keys("tiny", samples=4, batch=2)
    seconds = found["seconds"]
    assert min(seconds["image tower"], seconds["text tower"]) > 0
    share = (seconds["image tower"] + seconds["text tower"]) / seconds["whole"]
    assert found["share_in_towers"] == pytest.approx(share, abs=0.001)
    assert 0 < share < 1


def test_the_matrix_has_the_same_answers_and_keys_are_charged_once(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = prepare_project(tmp_path_factory.mktemp("evaluate"), tasks=2)
    recipe = recipe_on(root, tmp_path, tasks=2, train__steps=1)
    run_sequence(recipe, stages="train")
    found = bench_evaluate(recipe.run_path, limit=2)
    rows = found["variants"]
    assert (found["cells"], found["answers"]) == (3, 6)
    assert all(row["same_answers"] == 1 for row in rows.values())
    assert rows["reference"]["keys_gflop"] == 0
    assert 0 < rows["ours"]["keys_gflop"] == rows["batched"]["keys_gflop"] < rows["ours"]["gflop"]
    assert rows["ours"]["gflop"] <= rows["batched"]["gflop"]
    assert found["ratios"]["reference"]["batched"].keys() == {"wall_clock", "operations"}


def test_a_run_without_prototypes_has_a_matrix_too_and_one_without_prompt_sets_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = prepare_project(tmp_path_factory.mktemp("evaluate"), tasks=1)
    plain, updates = (
        recipe_on(root, tmp_path, tasks=1, train__steps=1, method={"name": name})
        for name in ("independent", "task_lora")
    )
    for recipe in (plain, updates):
        run_sequence(recipe, stages="train")
    assert bench_evaluate(plain.run_path, limit=2)["variants"]["ours"]["same_answers"] == 1
    with pytest.raises(UserError, match="has learned no prompt sets"):
        bench_evaluate(updates.run_path, limit=2)


def test_prompts_of_every_layer_are_compared_with_those_at_the_input() -> None:
    found = bench_step("tiny", samples=2, rounds=1, variants=("after_bos", "deep", "prefix"))
    assert found["ratios"]["after_bos"].keys() == {"after_bos", "deep", "prefix"}
    assert all(row["samples_per_s"] > 0 for row in found["variants"].values())
    with pytest.raises(UserError, match=r"expected some of .*deep, prefix"):
        bench_step("tiny", variants=("deeper",))


def test_the_command_line_prints_json_and_refuses_a_size_it_does_not_know() -> None:
    asked = CliRunner().invoke(app, ["step", "--size", "tiny", "--rounds", "1", "--variants", "after_bos", "--json"])
    assert asked.exit_code == 0
    assert json.loads(asked.stdout)["variants"]["after_bos"]["samples_per_s"] > 0
    wrong = CliRunner().invoke(app, ["step", "--size", "smal"])
    assert wrong.exit_code == 2
    assert "Did you mean 'small'?" in wrong.output


def test_on_a_gpu_the_peak_is_that_of_the_variant_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.zeros(100)
    said = {"memory_allocated": 1000, "max_memory_allocated": 1500}  # 600 bytes are other variants'
    for name, value in {**said, "synchronize": None, "reset_peak_memory_stats": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert measure.peak_bytes(lambda: None, {"own": own, "view": own[:3]}, "cuda") == 900
    assert measure.peak_bytes(lambda: None, None, "cuda") == 1500


def test_what_is_computed_again_is_no_use_of_the_device() -> None:
    found = measure.Measured(
        "full", 2.0, 1, operations=600, attention=0, peak_bytes=1, rounds=(2.0,), processor_rounds=(2.0,)
    )
    assert "utilisation" not in found.to_json(None)
    told = found.to_json(1000, needed=400)
    assert told["utilisation"] == 0.2
    assert told["hardware_utilisation"] == 0.3


def test_sets_to_answer_with_are_k_and_to_learn_behind_one_less() -> None:
    size = SIZES["tiny"]
    assert make_batch(size, 2, 1, 8, answers=False).selected.shape == (2, size.k)
    assert make_batch(size, 2, 1, 8).selected.shape == (2, size.k - 1)


def test_a_gpu_section_that_fails_or_comes_too_late_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, clock = tmp_path / "gpu.json", [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    seen: list[Any] = []

    def fails() -> dict[str, Any]:
        raise RuntimeError("no kernel")

    def works() -> dict[str, Any]:
        seen.append(json.loads(out.read_text())["steps"])
        return {"seconds": 1}

    def slow() -> dict[str, Any]:
        clock[0] += 4
        return {"seconds": 2}

    sections = [
        ("steps", "first", fails),
        ("steps", "second", works),
        ("steps", "third", slow),
        ("steps", "last", works),
    ]
    found = _measured({"steps": {}}, sections, out, deadline_s=6)["steps"]
    assert found["first"] == {"result": "failed: RuntimeError: no kernel"}
    assert seen == [{"first": found["first"]}]
    assert found["third"] == {"seconds": 2}
    assert found["last"]["result"].startswith("not measured")
    assert json.loads(out.read_text())["steps"] == found


@pytest.mark.slow
def test_the_script_for_gpus_runs_through_on_a_cpu(tmp_path: Path) -> None:
    found = bench_gpu("tiny", samples=4, answers=2, rounds=1, device="cpu", out=tmp_path / "gpu.json")
    assert len(found["steps"]) == 9
    assert all(row["samples_per_s"] > 0 for row in [*found["steps"].values(), *found["deepspeed"].values()])
    assert all(row["tokens_per_s"] > 0 for row in [*found["answering"]["all"].values(), *found["steps"].values()])
    assert found["switches"].keys() == {*SWITCHES}
    told = {name for name, row in found["switches"].items() if "seconds" not in row}
    assert told == {"flash", "flash_packing", "copy_ahead", "tf32"}  # which do nothing on a CPU
    assert found["torchtitan tokens/s/GPU"]["bfloat16, compiled"] == 6667
    assert json.loads((tmp_path / "gpu.json").read_text()) == found


@pytest.mark.slow
def test_the_goals_of_a_step_hold_at_size_small(monkeypatch: pytest.MonkeyPatch) -> None:
    # DeepSpeed's ZeRO-3 leaves a linear of its own behind in the process, which keeps its inputs.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    variants = ("reference", "after_bos", "after_image", "after_image_shared")
    ratios = bench_step("small", samples=4, rounds=1, variants=variants)["ratios"]["reference"]
    for name, goal in (("after_bos", 2.0), ("after_image", 3.5), ("after_image_shared", 8.0)):
        assert ratios[name]["operations"] >= goal
        assert ratios[name]["peak_memory"] >= 2


def test_switches_are_measured_against_the_step_without_and_those_of_gpus_are_told() -> None:
    found = bench_switches(
        "tiny", samples=4, rounds=1, switches=("packing", "static_cache", "tf32", "int8", "copy_ahead")
    )
    assert found["variants"].keys() == {"packing", "static_cache", "int8"}
    assert all(min(row["gain"], row["tokens_per_s"], row["first_s"]) > 0 for row in found["variants"].values())
    assert "times smaller" in found["variants"]["int8"]["note"] and found["variants"]["int8"]["peak_memory"] > 1
    assert found["not measured"]["copy_ahead"] == "there is nothing to copy on a CPU"
    with pytest.raises(UserError, match="No switch fast; expected some of compile, static_cache, packing"):
        bench_switches("tiny", switches=("fast",))


def test_flash_attention_is_measured_against_sdpa_and_packed_against_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("flash", "flash_packing")
    found = bench_switches("tiny", samples=4, rounds=1, switches=names)
    assert {*found["not measured"].values()} == {"FlashAttention 2 needs a GPU and the package flash-attn"}
    assert why_no_flash(torch.float32, "cpu") and not found["variants"]
    calls = use_flash_on_cpu(None, monkeypatch)
    monkeypatch.setattr(switches, "why_no_flash", lambda *_: "")
    rows = bench_switches("tiny", samples=4, rounds=1, switches=names)["variants"]
    assert all(min(row["gain"], row["tokens_per_s"], row["peak_memory"]) > 0 for row in rows.values())
    assert rows["flash_packing"]["note"].startswith("fill 1.000 of the decoder's columns are tokens, 0.")
    assert {*calls} == {"dense", "lengths"}


def test_the_batch_that_is_packed_has_short_samples_without_an_image_and_loses_no_column() -> None:
    size = replace(SIZES["tiny"], image_side=140)  # 100 tokens of an image
    batch = mixed_batch(size, 6)
    assert batch.has_image.tolist() == [True, False] * 3 and len(batch.images["pixel_values"]) == 3
    lengths = batch.attention.sum(1)
    assert (lengths[0] - lengths[1], int((batch.labels[1] != -100).sum())) == (size.image_tokens, size.answer_tokens)
    packed = Packed.of(batch.attention)
    assert packed.shape == (4, int(lengths[0]))  # the three without an image share a row
