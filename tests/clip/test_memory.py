"""The memory plan of a benchmark: what it counts exactly is exact, what it estimates is near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.check.clip import check_benchmark
from pipeline.clip.learning.memory_plan import image_tokens, kept_bytes, mixed_bytes, plan_benchmark
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.methods import make_learner
from pipeline.clip.search_space import SearchSpace, TowerOptions
from pipeline.clip.towers.backbone import Backbone
from tests.clip.project import make_project, recipe, recipe_file
from tests.clip.tiny import batch, byte_tokenizer, clip_model

MPL: dict[str, Any] = {"name": "mpl", "options": {"depth": 3}}
COCOOP: dict[str, Any] = {"name": "cocoop", "options": {"length": 2, "words": None}}
SIZES: dict[str, Any] = {"text_width": 128, "vision_width": 192, "blocks": 4}


def meta(**sizes: Any) -> Any:
    from transformers import CLIPModel

    config = clip_model(**sizes).config
    with torch.device("meta"):
        return CLIPModel(config)


def kept(module: PromptedCLIP) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters and what is kept twice not counted."""
    known = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(value)
        return value

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        module(batch(8))
    return sum(found.values())


@pytest.mark.parametrize(("method", "options"), [("mpl", {"depth": 3}), ("coop", {"length": 2})])
def test_what_a_forward_pass_keeps_is_what_is_planned(
    method: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # DeepSpeed's ZeRO-3 leaves a linear of its own behind in the process, which keeps its input.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    backbone = Backbone(clip_model(**SIZES))
    words = backbone.words(byte_tokenizer())
    names = [f"class number {number}" for number in range(20)]
    module = PromptedCLIP(backbone, make_learner(method, backbone, words, **options), words, names)
    config = backbone.model.config
    planned = kept_bytes(config.text_config, len(names), module.texts.ids.shape[1], 4)
    if module.learner.changes_images:
        tokens = image_tokens(config.vision_config) + max(module.learner.schedule.vision.present)
        planned += kept_bytes(config.vision_config, 8, tokens, 4)
    assert planned == pytest.approx(kept(module), rel=0.05)


def test_what_a_search_keeps_is_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    backbone, options = Backbone(clip_model(**SIZES)), TowerOptions((0, 1, 3, 6), (0, 2, 4))
    names = [f"class number {number}" for number in range(20)]
    space = SearchSpace(backbone.sizes, options)
    module = PromptedCLIP(backbone, space, backbone.words(byte_tokenizer()), names)
    config, tokens = backbone.model.config, module.texts.ids.shape[1]
    planned = mixed_bytes(config.text_config, len(names), tokens, options.text, 4)
    planned += mixed_bytes(config.vision_config, 8, image_tokens(config.vision_config), options.vision, 4)
    assert planned == pytest.approx(kept(module), rel=0.05)


def test_a_search_is_planned_where_it_needs_more_than_the_training(tmp_path: Path) -> None:
    def activations(search: Any, **train: Any) -> int:
        row = {"name": "dpl", "search": {"options": [0, 1, 2], **search}}
        plan = plan_benchmark(recipe(tmp_path, row, train=train), 1, meta(), classes=3, tested=3)
        return plan.bytes_of("activations")

    assert activations({"validation_batch": 100}) > 3 * activations({})
    assert activations({"global_batch": 100}) == activations({"validation_batch": 100})
    assert activations({"global_batch": 100}, micro_batch=50) < activations({"global_batch": 100})


def test_weights_trainables_and_ranks_are_counted(tmp_path: Path) -> None:
    model, benchmark = meta(), recipe(tmp_path, "zero_shot", MPL)
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    plan = plan_benchmark(benchmark, 1, model, classes=3, tested=3)
    backbone = Backbone(clip_model())
    learner = make_learner("mpl", backbone, backbone.words(byte_tokenizer()), depth=3)
    assert plan.bytes_of("trainables") == 4 * sum(parameter.numel() for parameter in learner.parameters())
    assert whole <= plan.bytes_of("weights") < 1.01 * whole
    sharded = recipe(tmp_path, MPL, train={"deepspeed": "ds_configs/zero3.json"})
    plan = plan_benchmark(sharded, 4, model, classes=3, tested=3)
    assert whole // 4 <= plan.bytes_of("weights") < whole // 4 + 4 * 1000
    assert plan.bytes_of("evaluation replica") >= whole


def test_cocoop_grows_with_images_times_classes_and_chunks_do_not(tmp_path: Path) -> None:
    def activations(classes: int, **changes: Any) -> int:
        benchmark = recipe(tmp_path, COCOOP, **changes)
        return plan_benchmark(benchmark, 1, meta(), classes, tested=3).bytes_of("activations")

    assert activations(100) > 8 * activations(10)
    assert activations(100, train={"global_batch": 16}) > 3 * activations(100)
    chunked = {"model": {"path": str(tmp_path / "model"), "text_chunk": 10}}
    assert activations(1000, **chunked) == activations(100, **chunked)


def test_check_plans_the_memory_of_a_benchmark(tmp_path: Path) -> None:
    folder = make_project(tmp_path)
    found = check_benchmark(str(recipe_file(folder, MPL)), []).to_json()
    assert found["memory"] == "not planned: the number of classes is not known before the data is prepared"
    known = recipe_file(folder, MPL, name="known", data={"datasets": ["dtd"], "prepare_first": False})
    found = check_benchmark(str(known), [], ranks=2).to_json()
    assert found["memory"]["ranks"] == 2
    assert found["memory"]["parts"]["activations"]["note"].startswith("training mpl, 24 classes")
