"""What a checkpoint must be like, and the sentence for one that is not."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.backbones.attentions import require_kernel
from pipeline.backbones.lmm import LMM, load_lmm, load_processor
from pipeline.backbones.lmm_weights import require_fitting_weights
from pipeline.check.model import check_model
from pipeline.config.load import load_recipe
from pipeline.config.models import ModelConfig
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.planning import frozen_models
from pipeline.planning.frozen_models import emulated
from pipeline.planning.model_files import ModelFiles
from pipeline.ranks.world import World
from tests import tiny
from tests.backbones.tiny_families import FAMILIES
from tests.training.worlds import make_recipe


def change(folder: Path, file: str, **fields: Any) -> None:
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, **fields}))


def test_check_accepts_every_supported_architecture(checkpoint: Path) -> None:
    assert check_model(ModelFiles(make_recipe(checkpoint).model, online=False, cuts=False)).startswith(str(checkpoint))


def test_processors_are_of_the_checkpoints_own_class_without_videos(lmm: LMM) -> None:
    expected = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "internvl": "InternVLProcessor", "smolvlm": "Idefics3Processor"}
    assert type(lmm.processor).__name__ == expected.get(lmm.family.kind, type(lmm.processor).__name__)
    assert not hasattr(lmm.processor, "video_processor")
    assert type(lmm.processor.image_processor).__name__.endswith("Pil")


def test_another_architecture_is_named_with_those_that_work(tmp_path: Path) -> None:
    folder = tiny.save_llava(tmp_path / "other")
    change(folder, "config.json", model_type="vipllava")
    with pytest.raises(UserError, match=r"type 'vipllava'; supported are llava, .*gemma3.*model\.path"):
        load_lmm(ModelConfig(path=str(folder)))


def test_vicuna_is_refused_where_the_model_marks_turns_otherwise(tmp_path: Path) -> None:
    folder = FAMILIES["qwen2_5_vl"](tmp_path)
    with pytest.raises(UserError, match=r"vicuna_v1.*'qwen2_5_vl'.*Set model\.template to auto"):
        load_processor(ModelConfig(path=str(folder), template="vicuna_v1"))


def test_an_architecture_with_marks_of_its_own_needs_its_chat_template(tmp_path: Path) -> None:
    folder = FAMILIES["internvl"](tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_processor(ModelConfig(path=str(folder)))


def test_gemma_needs_attention_that_can_look_ahead(tmp_path: Path) -> None:
    folder = FAMILIES["gemma3"](tmp_path)
    with pytest.raises(UserError, match=r"Gemma 3 with attention 'flex_attention'.*model\.attn_implementation"):
        load_lmm(ModelConfig(path=str(folder), attn_implementation="flex_attention"))


def test_flash_attention_needs_its_package_and_another_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelConfig(path=str(tmp_path), attn_implementation="flash_attention_2", dtype="float32")
    with pytest.raises(UserError, match=r"does not compute in float32; set model\.dtype to bfloat16"):
        load_lmm(settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    settings = settings.model_copy(update={"dtype": "bfloat16"})
    with pytest.raises(UserError, match="needs the package flash-attn, and it is not installed"):
        load_lmm(settings)
    require_kernel(settings, here=False)


def test_images_of_another_size_than_the_vision_tower_takes_are_refused(tmp_path: Path) -> None:
    folder = FAMILIES["internvl"](tmp_path)
    change(folder, "preprocessor_config.json", size={"height": 48, "width": 48})
    with pytest.raises(UserError, match="48x48 pixels, its vision tower takes 32x32"):
        load_lmm(ModelConfig(path=str(folder)))


def test_image_tokens_that_do_not_match_the_features_are_refused(lmm: LMM) -> None:
    example = lmm.conversation.example(Sample("a", tiny.png((1, 2, 3)), "what?", "red"))
    assert example.images is not None
    one_less = list(example.prompt)
    one_less.remove(lmm.image_token)
    with pytest.raises(UserError, match=r"The batch has \d+ image tokens for \d+ features"):
        lmm.embed(torch.tensor([one_less]), example.images, torch.tensor([True]))


def test_weights_go_to_the_device_asked_for_as_they_are_read(checkpoint: Path) -> None:
    lmm = load_lmm(ModelConfig(path=str(checkpoint)), device="meta")
    assert {parameter.device.type for parameter in lmm.parameters()} == {"meta"}


def test_a_dropped_model_is_freed_at_once(checkpoint: Path) -> None:
    gc.collect()
    gc.disable()  # what only the garbage collector finds stays on the device beside the next model
    try:
        lmm = load_lmm(ModelConfig(path=str(checkpoint)))
        model = weakref.ref(lmm.model)
        del lmm
        assert model() is None
    finally:
        gc.enable()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "changed"))


def test_check_and_loading_refuse_a_checkpoint_that_lacks_weights(checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path)
    tensors = weights(folder)
    joins = ("multi_modal_projector", "visual.merger", "connector")
    gone = [name for name in tensors if any(part in name for part in joins)]
    save_weights(folder, {name: value for name, value in tensors.items() if name not in gone})
    expected = rf"lacks {len(gone)} of the model's weights, for example model\..*; they would be initialised randomly"
    with pytest.raises(UserError, match=expected):
        load_lmm(ModelConfig(path=str(folder)))
    with pytest.raises(UserError, match=expected):
        load_lmm(ModelConfig(path=str(folder)), zero3={"zero_optimization": {"stage": 3}})
    with pytest.raises(UserError, match=expected):
        check_model(ModelFiles(make_recipe(folder).model, online=False, cuts=False))


def test_check_and_loading_refuse_weights_of_another_shape(checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path)
    tensors = weights(folder)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    save_weights(folder, {**tensors, name: tensors[name][:-1].contiguous()})
    with pytest.raises(UserError, match=r"1 weights of another shape .*q_proj\.weight: \[.*\], expected \["):
        load_lmm(ModelConfig(path=str(folder)))
    with pytest.raises(UserError, match="of another shape"):
        require_fitting_weights(ModelConfig(path=str(folder)))


def test_the_names_of_older_checkpoints_are_known(checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    expected = load_lmm(ModelConfig(path=str(folder))).state_dict()
    for rename in (older_name, newer_name):
        save_weights(folder, {rename(kind, name): value for name, value in weights(checkpoint).items()})
        require_fitting_weights(ModelConfig(path=str(folder)))
        loaded = load_lmm(ModelConfig(path=str(folder))).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def older_name(kind: str, name: str) -> str:
    """As the checkpoints on the Hub name it, before transformers' models were one module deeper."""
    name = re.sub(r"^model\.(visual|vision_tower|multi_modal_projector|image_newline)", r"\1", name)
    if kind == "qwen2_5_vl":
        return re.sub(r"^model\.language_model\.", "model.", name)
    if kind in ("fast_vlm", "idefics3", "smolvlm"):
        return name
    name = re.sub(r"^lm_head", "language_model.lm_head", name)
    return re.sub(r"^model\.language_model\.", "language_model.model.", name)


def newer_name(kind: str, name: str) -> str:
    """As the modules of transformers are named."""
    if kind in ("fast_vlm", "idefics3", "smolvlm"):
        return name
    if kind == "qwen2_5_vl":
        name = re.sub(r"^model\.(?!visual|language_model)", "model.language_model.", name)
    name = re.sub(r"^language_model\.lm_head", "lm_head", name)
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    return re.sub(r"^(visual|vision_tower|multi_modal_projector|image_newline)", r"model.\1", name)


def test_a_head_that_is_the_embedding_need_not_be_stored(tmp_path: Path) -> None:
    folder = tiny.save_llava(tmp_path, tied=True)
    assert not any("lm_head" in name for name in weights(folder))
    require_fitting_weights(ModelConfig(path=str(folder)))


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_llava(tmp_path)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"cannot be loaded"):
        load_lmm(ModelConfig(path=str(folder)))
    with pytest.raises(UserError, match=r"cut off or damaged"):
        check_model(ModelFiles(make_recipe(folder).model, online=False, cuts=False))


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize(
    "gone",
    [
        ("patch_size",),
        ("vision_feature_select_strategy",),
        ("num_additional_image_tokens",),
        ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"),
    ],
)
def test_what_older_processors_do_not_say_is_taken_from_the_model(
    kind: str, gone: tuple[str, ...], tmp_path: Path
) -> None:
    folder = FAMILIES[kind](tmp_path)
    expected = load_processor(ModelConfig(path=str(folder)))
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in gone}))
    found = load_processor(ModelConfig(path=str(folder)))
    assert all(getattr(found, name) == getattr(expected, name) for name in gone)
    check_model(ModelFiles(make_recipe(folder).model, online=False, cuts=False))


def test_a_folder_of_2024_has_no_processor_config(tmp_path: Path) -> None:
    folder = tiny.save_llava(tmp_path)
    settings = json.loads((folder / "processor_config.json").read_text())
    images = {**settings["image_processor"], "processor_class": "LlavaProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").unlink()
    check_model(ModelFiles(make_recipe(folder).model, online=False, cuts=False))


LINES = "{% for m in messages %}USER{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


@pytest.mark.parametrize(
    "turn",
    [
        "{{ m['role'] + ': ' + m['content'] }}",  # fails on a list of parts
        "{{ m['role'] }}: {{ m['content'] }}",  # writes the list as Python spells it
        "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}",  # has no place for the picture
        "{{ raise_exception('only text') }}",
    ],
)
def test_a_chat_template_that_does_not_place_pictures_is_refused(tmp_path: Path, turn: str) -> None:
    folder = tiny.save_llava(tmp_path)
    (folder / "chat_template.jinja").write_text(LINES.replace("USER", turn))
    with pytest.raises(UserError, match=r"does not place pictures .*set model\.template to vicuna_v1"):
        load_processor(ModelConfig(path=str(folder)))
    load_processor(ModelConfig(path=str(folder), template="vicuna_v1"))


def test_a_gpu_that_emulates_bfloat16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert "Tesla T4 emulates bfloat16" in emulated("bfloat16")
    assert not emulated("float32")


@pytest.mark.parametrize(("capability", "slow"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_a_cpu_without_instructions_for_bfloat16_is_named(
    capability: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert ("no instructions for bfloat16" in emulated("bfloat16")) == slow
    assert not emulated("float32")


@pytest.mark.parametrize("native", [True, False])
def test_a_start_names_a_gpu_that_only_emulates_bfloat16_once(
    native: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(frozen_models, "share", lambda *_: None)
    monkeypatch.setattr(frozen_models, "require_fitting_weights", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100-SXM2-32GB")
    with caplog.at_level(logging.WARNING, "pipeline"):
        recipe = load_recipe("nano", ["model.dtype=bfloat16"])
        frozen_models.fetch_models(recipe.model, recipe.keys, World(0, 1, 0, torch.device("cuda", 0)), lambda: None)
    assert caplog.text.count("Tesla V100-SXM2-32GB") == (not native)
