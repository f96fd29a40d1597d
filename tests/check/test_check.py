"""`check`: everything that is missing or does not fit, in one go, in sentences, before anything is computed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from data_prep.sources.addresses import COIN, UCIT, benchmark_of, images_of
from pipeline.check import switches
from pipeline.check.findings import Findings
from pipeline.check.sequence import check
from pipeline.cli.commands import app
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.data.keys import Keys
from pipeline.data.shards import IndexedShards
from pipeline.errors import EXIT_OK, EXIT_USER, UserError
from pipeline.hub import repository as hub
from pipeline.hub import weights
from pipeline.runs.claim import claim_run
from pipeline.runs.layout import COMPLETE, META
from pipeline.sequence.switches import require_switches
from tests import tiny, tiny_clip
from tests.processes import PROJECT

RECIPE = """
name: tiny
data:
  source: coin
  root: coin
  prepared: prepared
  workers: 1
  tasks: [{name: Shapes, metric: exact}, {name: Colours, metric: exact}]
model: {path: llava, max_length: 256}
keys: {path: clip}
method: {prompt_length: 2}
train: {steps: 2, global_batch: 4, lr_prompt: 1e-2, lr_head: 1e-3}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a tiny CLIP, two tasks in CoIN layout and their prepared shards."""
    from data_prep.prepare import prepare

    folder = tmp_path_factory.mktemp("project")
    tiny.save_llava(folder / "llava")
    tiny_clip.save_clip(folder / "clip")
    for task in ("Shapes", "Colours"):
        tiny_clip.save_coin(folder / "coin", task)
    (folder / "tiny.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare(load_recipe("tiny.yaml"), progress=False)
    return folder


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def recipe_with(*overrides: str) -> Recipe:
    return load_recipe("tiny.yaml", overrides)


def findings(*overrides: str, ranks: int | None = None, gpu_memory: float | None = None) -> Findings:
    return check(recipe_with(*overrides), "tiny.yaml", ranks, gpu_memory)


def only_problem(found: Findings, title: str) -> str:
    """The sentence of the only thing that is wrong."""
    assert found.problems.keys() == {title}, found.problems
    assert len(found.problems[title]) == 1, found.problems
    return found.problems[title][0]


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; `a__b` is field b of a."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        fields = content
        for key in outer:
            fields = fields[key]
        fields[last] = value
    path.write_text(json.dumps(content))


def another_llava(folder: Path, **changes: Any) -> str:
    """A checkpoint of its own with changes in its config.json, as the override that sets it."""
    tiny.save_llava(folder)
    edit(folder / "config.json", **changes)
    return f"model.path={folder}"


# ---------------------------------------------------------------------------------------------- as a user sees it


def test_what_is_in_place_is_found_and_the_memory_planned(here: Path) -> None:
    done = CliRunner().invoke(app, ["check", "tiny.yaml", "--ranks", "2", "--json"])
    assert done.exit_code == EXIT_OK, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ok"]
    assert found["data"] == "prepared (train/test): Shapes 7/5, Colours 7/5"
    assert found["memory"]["ranks"] == 2
    parts = found["memory"]["parts"]
    assert {"weights", "gathered window", "activations", "trainables", "optimizer"} < parts.keys()
    assert found["memory"]["bytes_per_gpu"]["training"] == sum(part["training"] for part in parts.values())
    # A sample has 16 image tokens, and two sets of two vectors can be inserted.
    assert "the longest sample read" in parts["activations"]["note"]


def test_a_machine_with_nothing_is_told_all_that_is_missing_and_where_to_get_it(empty_machine: Path) -> None:
    done = CliRunner().invoke(app, ["check", "coin_llava15_7b", "--ranks", "8", "--json"])
    assert done.exit_code == EXIT_USER
    assert "Traceback" not in done.stderr + done.stdout
    for needed in (
        "hf download llava-hf/llava-1.5-7b-hf",
        "hf download openai/clip-vit-large-patch14-336",
        "hf download Zacks-Chen/CoIN --repo-type dataset",
        "python -m pipeline prepare coin_llava15_7b",
        *COIN.images,
        *COIN.images.values(),
    ):
        assert needed in done.stderr, needed
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"].keys() == {"model", "keys", "data"}
    assert found["memory"]["ranks"] == 8, "planned by the sizes that the project knows"
    assert found["memory"]["bytes_per_gpu"]["evaluation"] > 13 << 30
    assert not any(empty_machine.parent.rglob("*.yaml")), "a check makes no run folder"


def test_a_quantised_model_is_planned_with_zero2_and_refused_with_zero3(here: Path) -> None:
    plain = findings("train.deepspeed=ds_configs/zero2.json").memory
    found = findings("model.quantization=int8")
    assert not found.problems and "float32, decoder in int8" in str(found.found["model"])
    assert found.memory is not None and plain is not None and found.memory.zero_stage == 2
    assert found.memory.bytes_of("weights") < plain.bytes_of("weights")
    assert "of them in int8" in next(entry.note for entry in found.memory.entries if entry.name == "weights")
    wrong = findings("model.quantization=int8", "train.deepspeed=ds_configs/zero3.json").problems
    assert wrong.keys() == {"deepspeed"} and "int8 is not possible under ZeRO-3" in wrong["deepspeed"][0]


def test_a_model_on_several_ranks_is_planned_and_refused_where_it_cannot_be_divided(here: Path) -> None:
    whole, found = findings(ranks=4).memory, findings("evaluate.engine=sharded", "evaluate.shards=2", ranks=4)
    assert not found.problems and found.found["evaluation"] == "2 models, each on 2 ranks"
    assert whole is not None and found.memory is not None and found.memory.evaluation < whole.evaluation
    for ranks, override, said in (
        (1, "seed=1", "this run has one"),
        (4, "evaluate.shards=3", "set it to one of 2, 4"),
        (4, "model.quantization=int8", "not possible with model.quantization int8"),
    ):
        done = CliRunner().invoke(
            app, ["check", "tiny.yaml", "--ranks", str(ranks), "--set", "evaluate.engine=sharded", "--set", override]
        )
        assert done.exit_code == EXIT_USER
        assert said in done.stderr and len(done.stderr.splitlines()) == 1


def test_answers_that_no_gpu_has_room_for_are_warned_of_with_what_helps(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "memory" not in findings(ranks=2).warnings
    monkeypatch.setattr("pipeline.check.sequence.ASSUMED_GPU", 1 << 20)
    assert "with evaluate.engine=sharded they take" in findings(ranks=2).warnings["memory"][0]
    assert "memory" not in findings(ranks=1).warnings
    assert "memory" not in findings("evaluate.engine=sharded", ranks=2).warnings


def test_a_missing_quantiser_and_weights_that_are_quantised_already_are_told(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.backbones.quantised.metadata.version", lambda name: "0.41.0")
    assert "needs bitsandbytes 0.50 or newer" in findings("model.quantization=nf4").problems["recipe"][0]
    stored = shutil.copytree("llava", tmp_path / "llava")
    edit(stored / "config.json", quantization_config={"quant_method": "gptq"})
    found = findings("model.quantization=int8", f"model.path={stored}")
    assert "are stored quantised already" in found.problems["model"][0]


def test_one_problem_is_one_line(here: Path) -> None:
    done = CliRunner().invoke(app, ["check", "tiny.yaml", "--ranks", "3"])
    assert done.exit_code == EXIT_USER
    assert done.stderr.startswith("error: 3 ranks do not divide the global batch 4; start 1, 2, 4 ranks")
    assert len(done.stderr.splitlines()) == 1


def test_several_problems_are_listed_by_check(here: Path) -> None:
    found = findings("train.deepspeed=zero9.json", "run_dir=tiny.yaml", ranks=3)
    assert found.problems.keys() == {"ranks", "deepspeed", "run folder"}
    lines = found.sentence("tiny.yaml").splitlines()
    assert lines[0] == "check tiny.yaml found 3 problems:"
    assert lines[2].startswith("- deepspeed: train.deepspeed: no file 'zero9.json'")


def test_the_ranks_are_told_with_their_torch_and_memory_with_the_ranks(here: Path) -> None:
    """The DeepSpeed of a machine without GPUs does not warn of that, and nothing is said of memory per GPU."""
    outside = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "pipeline", "check", "tiny.yaml"]
    env = {**outside, "PYTHONPATH": str(PROJECT), "COLUMNS": "400"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_OK, done.stderr
    assert f"; torch {torch.__version__}" in done.stdout
    assert "memory per rank" in done.stdout and "Setting accelerator" not in done.stdout + done.stderr


def test_gpus_that_torch_cannot_use_are_a_problem_of_the_ranks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert "There are GPUs (SLURM_GPUS_ON_NODE=8) and torch" in " ".join(findings().problems["ranks"])


def test_a_launch_is_checked_for_its_own_ranks(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert (findings().found["ranks"] or "").startswith("4, each 1 samples")


# ------------------------------------------------------------------------------------------------------ the model


def test_an_image_token_of_another_number_than_the_models(here: Path, tmp_path: Path) -> None:
    sentence = only_problem(findings(another_llava(tmp_path / "m", image_token_index=7)), "model")
    assert "'<image>' is number 3 for the tokenizer and 7 for the model" in sentence


def test_a_tokenizer_without_the_image_token(here: Path, tmp_path: Path) -> None:
    override = another_llava(tmp_path / "m")
    edit(tmp_path / "m" / "processor_config.json", image_token="<picture>")
    assert "does not know the image token '<picture>'" in " ".join(findings(override).problems["model"])


def test_a_vocabulary_that_ends_before_the_image_token(here: Path, tmp_path: Path) -> None:
    sentence = only_problem(findings(another_llava(tmp_path / "m", text_config__vocab_size=3)), "model")
    assert "'<image>' has number 3, and the model's vocabulary ends at 2" in sentence


def test_a_tokenizer_without_an_end_token(here: Path, tmp_path: Path) -> None:
    override = another_llava(tmp_path / "m")
    edit(tmp_path / "m" / "tokenizer_config.json", eos_token=None)
    assert "has no end token" in only_problem(findings(override), "model")


def test_a_processor_of_another_image_size_than_the_vision_tower(here: Path, tmp_path: Path) -> None:
    sentence = only_problem(findings(another_llava(tmp_path / "m", vision_config__image_size=48)), "model")
    assert "32" in sentence
    assert "48" in sentence


def test_a_processor_that_writes_another_number_of_image_tokens(here: Path, tmp_path: Path) -> None:
    override = another_llava(tmp_path / "m")
    edit(tmp_path / "m" / "processor_config.json", patch_size=16)
    assert "writes 4 image tokens and the model has 16 features" in only_problem(findings(override), "model")


def test_an_architecture_that_is_not_supported(here: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    problems = findings(f"model.path={tmp_path}").problems["model"]
    assert any("is of type clip; supported are llava" in sentence for sentence in problems)


def test_a_checkpoint_without_one_of_its_weight_files(here: Path, tmp_path: Path) -> None:
    override = another_llava(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "m" / weights.INDEX).write_text(json.dumps({"weight_map": files}))
    assert "lacks weights (model-00002-of-00002.safetensors)" in only_problem(findings(override), "model")


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(here: Path) -> None:
    sentence = only_problem(findings("model.path=./nowhere/llava"), "model")
    assert sentence.startswith("model.path: there is no folder './nowhere/llava'")


# ------------------------------------------------------------------------------------------------- keys and data


def test_keys_that_another_clip_made(here: Path, tmp_path: Path) -> None:
    tiny_clip.save_clip(tmp_path / "other", seed=1)
    problems = findings(f"keys.path={tmp_path / 'other'}").problems
    assert problems.keys() == {"data"}
    assert len(problems["data"]) == 4, "each split of each task"
    assert all("come from another CLIP: weights_sha256" in sentence for sentence in problems["data"])


@pytest.mark.parametrize(
    ("changes", "row", "said"),
    [
        (["method={name: modular, depth: 9}"], "memory", "depth of 9 reaches beyond the decoder, which has 2 layers"),
        (["method={name: modular, depth: 2, remove: 11}"], "recipe", "would remove 11 prompts, but only 10 are there"),
        (["method={name: dualprompt, task_layers: [1, 4]}"], "memory", "method.task_layers names layer 4"),
        (
            ["method={name: coda, layers: [2]}"],
            "memory",
            "layers names layer 2; the decoder has 2 layers, 0 to 1",
        ),
        (["method={name: l2p, chosen: 20}"], "recipe", "chosen 20 of a pool of 10"),
        (
            ["method={name: dualprompt}", "model.attn_implementation=flash_attention_2", "model.dtype=bfloat16"],
            "recipe",
            "with attention 'flash_attention_2', which takes no mask with a row per position; expected sdpa or eager",
        ),
    ],
)
def test_prompts_that_the_decoder_cannot_carry_are_named(here: Path, changes: list[str], row: str, said: str) -> None:
    assert said in only_problem(findings(*changes), row)


@pytest.mark.parametrize(
    ("changes", "row", "said"),
    [
        (
            ["train.compile=decoder", "train.deepspeed=ds_configs/zero3.json"],
            "deepspeed",
            "compile decoder is not possible under",
        ),
        (
            ["train.compile=decoder", "model.quantization=int8"],
            "recipe",
            "with model.quantization int8, whose products",
        ),
        (
            ["train.compile=decoder", "method={name: task_lora}"],
            "recipe",
            "with the method task_lora, whose modules act",
        ),
        (["train.packing=samples", "method={name: coda}"], "recipe", "Set train.packing to none, or choose another"),
        (["train.packing=samples", "method.insertion=after_image"], "recipe", "which computes a sample in two passes"),
        (
            ["train.packing=samples", "model.attn_implementation=flex_attention"],
            "speed",
            "attention 'flex_attention' takes",
        ),
        (["evaluate.static_cache=true", "method={name: coda}"], "recipe", "Set evaluate.static_cache to false, or"),
        (
            ["evaluate.static_cache=true", "model.attn_implementation=flex_attention"],
            "speed",
            "evaluate.static_cache is not possible with this model",
        ),
    ],
)
def test_switches_for_speed_that_cannot_be_combined_are_named(
    here: Path, changes: list[str], row: str, said: str
) -> None:
    assert said in only_problem(findings(*changes), row)


def test_a_cache_of_fixed_size_is_for_replicas(here: Path) -> None:
    both = ["evaluate.static_cache=true", "evaluate.engine=sharded"]
    with pytest.raises(UserError, match="static_cache true is not possible with evaluate"):
        require_switches(load_recipe("tiny.yaml", both))


def test_switches_for_speed_are_listed_where_a_recipe_sets_them(here: Path) -> None:
    assert switches.TITLE not in findings().found
    found = findings(
        "train.compile=decoder_and_tower", "train.packing=samples", "train.copy_ahead=true", "model.tf32=true"
    )
    assert not found.problems
    listed = "train.compile decoder_and_tower, train.packing samples, train.copy_ahead true, model.tf32 true"
    assert found.found[switches.TITLE] == f"{listed}; copying ahead, TF32 and graphs do nothing on CPUs"
    assert "ZeRO stage 2" in str(found.found["deepspeed"])


def test_flash_attention_is_planned_where_it_is_not_installed_and_packs_by_lengths(here: Path) -> None:
    flash = "model.attn_implementation=flash_attention_2"
    found = findings(flash, "model.dtype=bfloat16", "train.packing=samples")
    assert not found.problems and "train.packing samples" in str(found.found[switches.TITLE])
    assert "compared" not in str(found.found[switches.TITLE]) and "not planned" not in str(found.found["memory"])
    assert "flash_attention_2 does not compute in float32" in only_problem(findings(flash), "model")


@pytest.mark.parametrize("name", ["modalprompt", "modular, depth: 2", "l2p"])
def test_rows_behind_the_image_need_layers_that_go_on_from_a_cache(here: Path, tmp_path: Path, name: str) -> None:
    behind = f"method={{name: {name}, insertion: after_image}}"
    assert not findings(behind).problems
    windowed = another_llava(tmp_path / "m", text_config__sliding_window=16)
    sentence = only_problem(findings(windowed, behind), "insertion")
    assert sentence.startswith("method.insertion: after_image is not possible with this model: this llava has layers")


def test_a_router_whose_statistics_need_more_samples_than_a_task_has_is_warned_of(here: Path) -> None:
    assert "routing" not in findings("method.router=mean").found
    tasks = "data.tasks=[{name: Shapes, metric: exact, limit_train: 3}, {name: Colours, metric: exact}]"
    found = findings("method.router=ridge", tasks)
    assert found.found["routing"] == "ridge; a task keeps the routing keys of up to 128 training samples"
    assert not found.problems and len(found.warnings["routing"]) == 1
    assert found.warnings["routing"][0].endswith("routed by the means of the tasks' keys: Shapes (3).")


def test_routing_keys_that_are_not_finite_are_a_problem(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = IndexedShards(load_recipe("tiny.yaml").data.split_path("Colours", "train")).keys()
    text = found.text.clone()
    text[2:4] = float("nan")
    damaged = SimpleNamespace(keys=lambda: Keys(found.image, text, found.has_image, {}))
    monkeypatch.setattr("pipeline.check.routing.IndexedShards", lambda _: damaged)
    sentences = findings("method.router=ridge").problems["routing"]
    assert len(sentences) == 2 and all("2 of 7 samples of the task" in sentence for sentence in sentences)


def test_a_method_whose_parts_do_not_go_together_is_refused_before_the_model_is_loaded(here: Path) -> None:
    lora = "method={name: task_lora, "
    plan = only_problem(findings(lora + "targets: [q_proj, qproj]}"), "memory")
    assert "no linear layer of the decoder ends in 'qproj'; expected among" in plan
    assert plan.endswith("Did you mean 'q_proj'?")
    assert "no prompt set that its router" in only_problem(findings(lora + "router: prototype}"), "recipe")
    shared = only_problem(findings(lora + "rank: 2}", "evaluate.share_images=true"), "recipe")
    assert "share_images: true is not possible" in shared
    assert not findings(lora + "rank: 2}").problems


def test_a_metric_that_does_not_fit_the_answers(here: Path) -> None:
    tasks = "data.tasks=[{name: Shapes, metric: iou}, {name: Colours, metric: exact}]"
    sentence = only_problem(findings(tasks), "data")
    assert "Shapes/test: the metric iou gives no point to the samples' own answers (the first is 'thing 0')" in sentence


def test_a_sample_that_is_too_long_for_the_model(here: Path) -> None:
    problems = findings("model.max_length=20").problems["data"]
    assert any("Shapes/train" in sentence and "model.max_length" in sentence for sentence in problems)


@pytest.fixture
def raw(here: Path, tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A CoIN folder of which nothing is prepared, and the overrides that name it."""
    tiny_clip.save_coin(tmp_path / "coin", "Shapes")
    return tmp_path / "coin", (
        f"data.root={tmp_path / 'coin'}",
        f"data.prepared={tmp_path / 'prepared'}",
        "data.tasks=[{name: Shapes, metric: exact}]",
    )


def test_data_that_can_be_prepared_only_lacks_the_command(raw: tuple[Path, tuple[str, ...]]) -> None:
    sentence = only_problem(findings(*raw[1]), "data")
    assert sentence.startswith("task 'Shapes' not prepared")
    assert sentence.endswith("run `python -m pipeline prepare tiny.yaml`.")


def test_data_that_run_prepares_is_no_problem(raw: tuple[Path, tuple[str, ...]]) -> None:
    found = findings(*raw[1], "data.prepare_first=true")
    assert not found.problems
    assert "1 task that `run` prepares first" in (found.found["data"] or "")


def test_a_missing_image_is_named_with_its_record_before_anything_is_prepared(
    raw: tuple[Path, tuple[str, ...]],
) -> None:
    root, overrides = raw
    (root / "images" / "Shapes-train-0.jpg").unlink()
    (root / "images" / "Shapes-train-1.png").write_bytes(b"no picture")
    problems = findings(*overrides).problems["data"]
    assert any("train.json" in sentence and "Shapes-train-0.jpg" in sentence for sentence in problems)
    assert any("train.json" in sentence and "Shapes-train-1.png" in sentence for sentence in problems)


def test_a_bad_record_far_from_the_samples_looked_at_is_named(raw: tuple[Path, tuple[str, ...]]) -> None:
    root, overrides = raw
    file = root / "instructions" / "Shapes" / "train.json"
    records = json.loads(file.read_text())
    del records[6]["conversations"][1]
    file.write_text(json.dumps(records))
    problems = findings(*overrides).problems["data"]
    assert any(sentence.startswith("Shapes/train: ") and "Shapes-6" in sentence for sentence in problems)
    tolerated = findings(*overrides, "data.skip_bad=1").problems["data"]
    assert not any("Shapes-6" in sentence for sentence in tolerated)


def test_a_missing_task_folder_names_what_should_be_there(raw: tuple[Path, tuple[str, ...]]) -> None:
    problems = findings(*raw[1], "data.tasks=[{name: Shapes}, {name: Sizes}]").problems["data"]
    (sentence,) = (sentence for sentence in problems if "has no instructions/Sizes, with train.json and" in sentence)
    assert "`python -m pipeline new-task Sizes --images FOLDER --samples TABLE --root " in sentence


def test_every_task_of_the_benchmarks_has_a_source_for_its_images() -> None:
    assert benchmark_of(["ScienceQA", "OCR-VQA"]) is COIN
    assert benchmark_of(["ImageNet-R", "ArxivQA", "VizWiz", "IconQA", "CLEVR-Math", "Flickr30k"]) is UCIT
    assert benchmark_of(["ScienceQA", "Shapes"]) is None
    assert images_of(COIN, "OCR-VQA") == COIN.images["OCRVQA"]


# ------------------------------------------------------------------------------------------------- the run folder


@pytest.fixture
def finished_stage(here: Path, tmp_path: Path) -> tuple[Path, str]:
    """A run with one finished stage on the tiny model, and the override that names it."""
    from pipeline.backbones.base_model import base_fingerprint
    from pipeline.backbones.clip import key_identity
    from pipeline.data.shards import IDENTITY_FIELDS

    override = f"run_dir={tmp_path / 'run'}"
    recipe = recipe_with(override)
    folder = claim_run(recipe) / "stages" / "01-Shapes"
    folder.mkdir(parents=True)
    identity = key_identity(*recipe.keys.source)
    clip = {name: identity[name] for name in IDENTITY_FIELDS}
    (folder / META).write_text(json.dumps({"base_model": base_fingerprint(recipe.model), "clip": clip}))
    (folder / COMPLETE).touch()
    return folder, override


def test_a_run_on_the_same_base_model_can_go_on(finished_stage: tuple[Path, str]) -> None:
    found = findings(finished_stage[1])
    assert not found.problems
    assert "1 stages trained on this base model and CLIP" in (found.found["run folder"] or "")


@pytest.mark.parametrize("field", ["base_model", "clip"])
def test_a_stage_trained_on_something_else_is_refused(finished_stage: tuple[Path, str], field: str) -> None:
    folder, override = finished_stage
    edit(folder / META, **{field: "another"})
    sentence = only_problem(findings(override), "run folder")
    assert sentence.startswith(f"{folder} was trained with another {field.replace('_', ' ')}")


def test_a_run_folder_of_another_recipe_is_refused(finished_stage: tuple[Path, str]) -> None:
    sentence = only_problem(findings(finished_stage[1], "method.k=2"), "run folder")
    assert "method.k: 3 there, 2 now" in sentence


def test_a_folder_with_other_things_is_no_run_folder(here: Path) -> None:
    assert "is not a run" in only_problem(findings("run_dir=clip"), "run folder")


# -------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine where nothing says that the Hub must not be asked."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    connects = hub._connects
    connects.cache_clear()
    yield
    connects.cache_clear()


def test_a_hub_that_answers_is_reachable(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with hub.no_waiting(["owner/model"]) as found:
            assert found
            assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_is_silent_is_given_up_after_some_seconds(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "PATIENCE_S", 0.2)
    closing = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *_: (closing.wait(60), socket.socket())[1])
    began = time.monotonic()
    with hub.no_waiting(["owner/model"]) as found:
        assert not found
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    assert time.monotonic() - began < 20
    closing.set()


def test_the_hub_is_not_tried_for_folders(online: None, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_connects", lambda endpoint: pytest.fail("the Hub was tried"))
    assert not findings().problems


def test_weights_that_are_still_on_the_hub_are_no_problem_and_pickled_ones_will_be_converted(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.check.model import check_keys
    from pipeline.errors import UserError

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    recipe = recipe_with("keys.path=owner/clip")
    monkeypatch.setattr(hub, "offered_weights", lambda *_: "safetensors")
    assert check_keys(recipe.keys, online=True) == ("owner/clip: on the Hub, fetched by `prepare`", None)
    monkeypatch.setattr(hub, "offered_weights", lambda *_: "pickled")
    expected = "owner/clip: on the Hub as .bin files, converted once into safetensors, fetched by `prepare`"
    assert check_keys(recipe.keys, online=True) == (expected, None)
    monkeypatch.setattr(hub, "offered_weights", lambda *_: "none")
    with pytest.raises(UserError, match=r"keys\.path: 'owner/clip' has no weights on the Hub"):
        check_keys(recipe.keys, online=True)


def test_auto_says_which_deepspeed_file_it_is_here_and_from_which_gpu_on_another(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = findings("train.deepspeed=auto")
    assert not found.problems
    assert "auto: ds_configs/zero3.json without GPUs, ZeRO-2 on GPUs of 1.0" in str(found.found["memory"])
    assert found.memory is not None and found.memory.zero_stage == 3
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Card")
    monkeypatch.setattr("pipeline.check.device.gpu_memory", lambda _: 80 << 30)
    large = findings("train.deepspeed=auto", ranks=1)
    said = str(large.found["memory"])
    assert "auto: ds_configs/zero2.json, checkpointing none" in said
    assert said.startswith("for 1 GPU of 80.0 GiB (Card), as here: fits, ")
    assert large.memory is not None and large.memory.zero_stage == 2


def test_what_this_machine_lacks_is_not_told_of_a_card_elsewhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.check.model.emulated", lambda dtype: f"no instructions for {dtype}")
    changes = ("train.copy_ahead=true", "model.dtype=bfloat16")
    on_cpus, on_card = findings(*changes), findings(*changes, gpu_memory=24)
    assert not on_cpus.problems and not on_card.problems
    assert "no instructions for bfloat16" in str(on_cpus.found["model"])
    assert "no instructions" not in str(on_card.found["model"])
    assert "nothing on CPUs" in str(on_cpus.found[switches.TITLE])
    assert "nothing on CPUs" not in str(on_card.found[switches.TITLE])
