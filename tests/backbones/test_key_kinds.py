"""`keys.kind`: keys of a SigLIP and of a multimodal model's own towers, beside those of a CLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from data_prep.prepare import prepare
from pipeline.backbones.clip import KeyEncoder, key_identity
from pipeline.backbones.key_encoders import OwnKeys, SiglipKeys, key_encoder
from pipeline.config.load import load_recipe
from pipeline.config.models import KeysConfig
from pipeline.config.recipe import Recipe
from pipeline.data.shards import IndexedShards
from pipeline.errors import UserError
from pipeline.planning.model_files import clip_key_width
from tests.backbones.tiny_families import FAMILIES, byte_tokenizer
from tests.tiny_clip import save_clip, save_coin

PICTURES = [Image.effect_noise((40, 30), sigma).convert("RGB") for sigma in (30, 60, 90)]
TEXTS = ["what is this?", "why?"]
CONTEXT = 12


def save_siglip(folder: Path) -> Path:
    """A tiny random SigLIP of image and text features of width 16."""
    tokenizer = byte_tokenizer(["<pad>", "<eos>"], None, "<eos>", "<pad>", adds_bos=False)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = SiglipConfig(
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "pad_token_id": 0},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        SiglipModel(config).save_pretrained(folder)
    tokenizer.model_max_length = CONTEXT
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    made = {kind: FAMILIES[kind](root / kind) for kind in ("llava", "fast_vlm", "qwen2_5_vl")}
    return {**made, "siglip": save_siglip(root / "siglip"), "clip": save_clip(root / "clip")}


def test_the_default_kind_is_clip(folders: dict[str, Path]) -> None:
    assert type(key_encoder(*KeysConfig(path=str(folders["clip"])).source)) is KeyEncoder
    assert "kind" not in key_identity(folders["clip"])


def test_siglip_keys_are_its_features_of_padded_texts(folders: dict[str, Path]) -> None:
    encoder = key_encoder(folders["siglip"], kind="siglip")
    assert isinstance(encoder, SiglipKeys)
    model = SiglipModel.from_pretrained(folders["siglip"]).eval()
    ids = [encoder.tokenizer(text, add_special_tokens=True)["input_ids"][:CONTEXT] for text in TEXTS]
    padded = torch.tensor([row + [0] * (CONTEXT - len(row)) for row in ids])
    with torch.no_grad():
        texts = model.get_text_features(input_ids=padded).pooler_output
        images = model.get_image_features(pixel_values=encoder.pixels(PICTURES)).pooler_output
    torch.testing.assert_close(encoder.text(TEXTS), texts)
    torch.testing.assert_close(encoder.text(TEXTS[1:]), texts[1:])
    torch.testing.assert_close(encoder.image(PICTURES), images)
    assert encoder.width == texts.shape[1] == 16


@pytest.mark.parametrize("kind", ["llava", "fast_vlm"])
def test_own_keys_are_means_of_features_and_of_word_embeddings(folders: dict[str, Path], kind: str) -> None:
    encoder = key_encoder(folders[kind], kind="own")
    assert isinstance(encoder, OwnKeys)
    model = AutoModelForImageTextToText.from_pretrained(folders[kind]).eval()
    pixels = encoder.pixels(PICTURES)
    with torch.no_grad():
        if kind == "llava":
            hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        else:
            hidden = model.model.vision_tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        rows = model.get_input_embeddings()
        words = [
            rows(encoder.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"])[0].mean(0)
            for text in TEXTS
        ]
    torch.testing.assert_close(encoder.image(PICTURES)[:, : hidden.shape[-1]], hidden.mean(1))
    torch.testing.assert_close(encoder.text(TEXTS)[:, : words[0].shape[-1]], torch.stack(words))
    assert encoder.image(PICTURES).shape[1] == encoder.text(TEXTS).shape[1] == encoder.width
    assert clip_key_width(KeysConfig(kind="own", path=str(folders[kind]))) == encoder.width
    assert encoder.text([""]).isfinite().all()


def test_narrower_own_keys_are_filled_up_with_zeros(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = key_encoder(folders["llava"], kind="own")
    narrow = torch.arange(6.0).view(2, 3)
    filled = encoder._filled(narrow)  # type: ignore[attr-defined]
    assert torch.equal(filled[:, :3], narrow) and not filled[:, 3:].any() and filled.shape == (2, encoder.width)


def test_the_kind_is_part_of_the_identity(folders: dict[str, Path]) -> None:
    own, clip = (key_identity(folders["llava"], kind="own"), key_identity(folders["clip"]))
    assert own["kind"] == "own" and own == key_encoder(folders["llava"], kind="own").identity()
    assert own["weights_sha256"] != clip["weights_sha256"]


def test_other_kinds_are_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"keys\.path"):
        key_identity(folders["llava"], kind="siglip")
    with pytest.raises(UserError, match=r"keys\.path"):
        key_identity(folders["clip"], kind="own")
    with pytest.raises(UserError, match=r"keys\.kind is own, and .* is of type qwen2_5_vl"):
        key_encoder(folders["qwen2_5_vl"], kind="own")


def recipe_of(tmp_path: Path, keys: dict[str, Any], model: Path) -> Recipe:
    save_coin(tmp_path / "coin")
    fields = {
        "name": "tiny",
        "data": {
            "source": "coin",
            "root": str(tmp_path / "coin"),
            "prepared": str(tmp_path / "prepared"),
            "tasks": [{"name": "Shapes"}],
        },
        "model": {"path": str(model)},
        "keys": keys,
        "train": {"steps": 1, "lr_prompt": 1e-3, "lr_head": 1e-3},
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(fields))
    return load_recipe(tmp_path / "tiny.yaml")


def test_a_recipe_with_own_keys_needs_no_other_model(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"kind": "own", "batch": 2}, folders["fast_vlm"])
    assert recipe.keys.path == recipe.model.path
    prepare(recipe, progress=False)
    keys = IndexedShards(recipe.data.split_path("Shapes", "train")).keys(key_identity(*recipe.keys.source))
    assert keys.identity["kind"] == "own" and keys.image.shape == keys.text.shape == (7, 32)
    assert float(keys.image[keys.has_image].float().abs().sum()) > 0
    with pytest.raises(UserError, match="another CLIP"):
        IndexedShards(recipe.data.split_path("Shapes", "train")).keys(key_identity(folders["clip"]))


def test_a_kind_has_its_features_only(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="kind own has one feature of a text; expected text_feature projected"):
        recipe_of(tmp_path, {"kind": "own", "text_feature": "pooled"}, folders["llava"])
