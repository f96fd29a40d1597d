from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from pipeline.backbones.clip import KeyEncoder, key_identity
from pipeline.errors import UserError
from tests.tiny_clip import CONTEXT, IMAGE_SIZE, save_clip

PICTURES = [Image.new("RGB", (30, 20), colour) for colour in ("red", "navy", "olive")]


def test_image_keys_are_the_projected_image_embeddings(clip):
    encoder = KeyEncoder(clip)
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=encoder.pixels(PICTURES)).pooler_output
        expected = model.visual_projection(pooled)
    torch.testing.assert_close(encoder.image(PICTURES), expected)
    assert encoder.pixels(PICTURES).shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("feature", ["projected", "pooled"])
def test_text_keys_are_projected_or_pooled(clip, feature):
    encoder = KeyEncoder(clip, text_feature=feature)
    model = CLIPModel.from_pretrained(clip).eval()
    ids = torch.tensor([encoder.tokenizer("a dog")["input_ids"]])
    with torch.no_grad():
        pooled = model.text_model(input_ids=ids).pooler_output
        expected = pooled if feature == "pooled" else model.text_projection(pooled)
    # Beside a longer text, so that padding must not matter.
    torch.testing.assert_close(encoder.text(["a dog", "a very big dog"])[:1], expected, atol=1e-5, rtol=1e-5)


def test_a_text_longer_than_the_context_is_cut_at_its_end(clip):
    encoder = KeyEncoder(clip)
    long = "abcdefghijklmnopqrstuvwxyz" * 4
    assert encoder.max_text == CONTEXT
    torch.testing.assert_close(encoder.text([long]), encoder.text([long[: CONTEXT - 2]]))
    assert not torch.equal(encoder.text([long]), encoder.text([long[: CONTEXT - 3]]))


def test_the_tail_of_a_long_text_can_be_kept_instead(clip):
    head, tail = KeyEncoder(clip), KeyEncoder(clip, text_truncation="tail")
    long = "abcdefghijklmnopqrstuvwxyz" * 4
    torch.testing.assert_close(tail.text([long]), head.text([long[-(CONTEXT - 2) :]]))
    assert not torch.equal(tail.text([long]), head.text([long]))
    torch.testing.assert_close(tail.text(["a dog"]), head.text(["a dog"]))


def test_the_truncation_is_part_of_the_identity(clip):
    head, tail = key_identity(clip), KeyEncoder(clip, text_truncation="tail").identity()
    assert head == key_identity(clip, text_truncation="head") != tail
    assert head["preprocessing_sha256"] != tail["preprocessing_sha256"]


def test_the_context_of_the_model_counts_when_the_tokenizer_knows_none(clip, tmp_path):
    shutil.copytree(clip, tmp_path / "clip")
    config = tmp_path / "clip" / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    del fields["model_max_length"]
    config.write_text(json.dumps(fields))
    encoder = KeyEncoder(tmp_path / "clip")
    assert encoder.max_text == CONTEXT
    assert encoder.text(["x" * 3 * CONTEXT]).shape == (1, encoder.width)


def test_pooled_text_of_another_width_is_refused(tmp_path):
    save_clip(tmp_path, text_width=32)
    assert KeyEncoder(tmp_path, text_feature="projected").text(["x"]).shape == (1, 16)
    with pytest.raises(UserError, match=r"pooled text of width 32 and image keys of width 16.*to projected"):
        KeyEncoder(tmp_path, text_feature="pooled")


def test_the_encoder_is_frozen(clip):
    assert not any(parameter.requires_grad for parameter in KeyEncoder(clip).model.parameters())


def test_the_identity_does_not_depend_on_where_the_checkpoint_lies(clip, other_clip, tmp_path):
    moved = shutil.copytree(clip, tmp_path / clip.name)
    assert key_identity(moved) == key_identity(clip) == KeyEncoder(clip).identity()
    assert key_identity(other_clip)["weights_sha256"] != key_identity(clip)["weights_sha256"]


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer.json"])
def test_the_identity_follows_image_and_text_preprocessing(clip, tmp_path, file):
    changed = shutil.copytree(clip, tmp_path / "clip")
    (changed / file).write_text((changed / file).read_text() + " ")
    assert key_identity(changed)["preprocessing_sha256"] != key_identity(clip)["preprocessing_sha256"]


def test_a_path_that_is_nothing_is_refused(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"keys\.path is 'no/such/clip here', which is neither a folder"):
        KeyEncoder("no/such/clip here")


def test_weights_in_a_bin_file_make_the_same_keys_and_the_same_identity(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    folder = shutil.copytree(clip, tmp_path / "clip")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert {**key_identity(folder), "clip": ""} == {**key_identity(clip), "clip": ""}
    assert torch.equal(KeyEncoder(folder).text(["a red thing"]), KeyEncoder(clip).text(["a red thing"]))


def test_pickled_code_is_never_run(clip, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    folder = shutil.copytree(clip, tmp_path / "clip")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Trap(tmp_path / "run")}, folder / "pytorch_model.bin")
    for use in (KeyEncoder, key_identity):
        with pytest.raises(UserError, match=r"keys\.path: .*pytorch_model\.bin holds more than tensors: pickled code"):
            use(folder)
    assert not (tmp_path / "run").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_missing_tensors_are_not_replaced_by_random_ones(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors, for example text_projection\.weight"):
        KeyEncoder(folder)


def test_a_truncated_weight_file_is_refused(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"weights in .* cannot be loaded"):
        KeyEncoder(folder)


def test_a_model_that_is_no_clip_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="is a model of type 'llama'; supported are clip"):
        KeyEncoder(tmp_path)
