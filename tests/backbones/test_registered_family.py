"""A model family from outside the project: registered under a model_type, loaded, and answered with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

from pipeline.backbones.decoding import Prompts, generate
from pipeline.backbones.families.llava import Llava
from pipeline.backbones.lmm import load_lmm
from pipeline.backbones.lmm_families import family_of, known_families
from pipeline.config import registry
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Examples, collate_prompts
from pipeline.data.stage_data import StageData
from pipeline.errors import UserError
from tests.backbones.test_families import EVERY, NEW, NONE, SAMPLES, plain_answer, plain_inputs, seen
from tests.backbones.tiny_families import FAMILIES
from tests.training.worlds import make_samples


class VipLlava(Llava):
    """ViP-LLaVA: LLaVA-1.5 with features of several layers of the tower."""

    kind = "vipllava"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    registry.register("lmm_families", "vipllava", f"{__name__}:VipLlava")


def test_a_registered_family_is_known_by_its_model_type(registered: None) -> None:
    assert known_families()[-1] == "vipllava"
    assert family_of("vipllava") is VipLlava


def test_an_unregistered_model_type_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match=r"of type 'vipllava'; supported are llava, .*llava_next, .*gemma3\."):
        family_of("vipllava")


def save_vip_llava(folder: Path) -> Path:
    """A tiny ViP-LLaVA with the text model, tower and processor of the tiny LLaVA."""
    FAMILIES["llava"](folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    parts = {
        name: config[name]
        for name in ("text_config", "vision_config", "image_token_index", "image_token_id")
        if name in config
    }
    torch.manual_seed(0)
    model = VipLlavaForConditionalGeneration(VipLlavaConfig(**parts, vision_feature_layers=[-2, -1]))
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    model.save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("registered")
def test_a_model_of_a_registered_family_answers_as_it_does_in_transformers(tmp_path: Path) -> None:
    lmm = load_lmm(ModelConfig(path=str(save_vip_llava(tmp_path)), max_length=512))
    examples = Examples(StageData([(SAMPLES, make_samples(len(SAMPLES))[1], None)]), lmm.conversation)
    with torch.no_grad():
        prompts = Prompts(*seen(lmm, collate_prompts(examples, EVERY, NONE), None, left=True))
    assert generate(lmm, prompts, NEW) == [plain_answer(lmm, plain_inputs(lmm, sample)) for sample in SAMPLES]
