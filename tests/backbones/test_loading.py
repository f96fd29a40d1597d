"""What a checkpoint must be like, and the sentence for one that is not."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbones.lmm import LMM, load_lmm, load_processor
from pipeline.check_model import CheckedModel, check_model
from pipeline.config import ModelConfig
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from tests import tiny
from tests.backbones.tiny_families import FAMILIES
from tests.train.worlds import make_recipe


def change(folder: Path, file: str, **fields: Any) -> None:
    settings = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**settings, **fields}))


def test_check_accepts_every_supported_architecture(checkpoint: Path) -> None:
    assert check_model(CheckedModel(make_recipe(checkpoint), online=False)).startswith(str(checkpoint))


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
