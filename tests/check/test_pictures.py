"""`check` names pictures of which the model sees the centre only."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from pipeline.check.pictures import cut_off
from pipeline.config.models import ModelConfig
from pipeline.data.sample import Sample
from pipeline.planning.model_files import ModelFiles
from tests import tiny
from tests.backbones.tiny_families import FAMILIES


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("pictures") / "llava")


def samples(*sizes: tuple[int, int]) -> list[Sample]:
    found = []
    for number, size in enumerate(sizes):
        buffer = io.BytesIO()
        Image.new("RGB", size).save(buffer, "PNG")
        found.append(Sample(str(number), buffer.getvalue(), "?", "!"))
    return found


def warned(folder: Path, *sizes: tuple[int, int], padding: str = "none") -> list[str]:
    settings = ModelConfig.model_validate({"path": str(folder), "image_padding": padding})
    return cut_off(ModelFiles(settings, False, False), samples(*sizes))


def test_wide_and_high_pictures_are_counted_and_the_worst_is_told(llava: Path) -> None:
    (sentence,) = warned(llava, (400, 100), (100, 150), (100, 100), (110, 100))
    assert "of 2 of 4 pictures that were looked at, the model sees less than 80%, of one 25%" in sentence
    assert "Set model.image_padding to stretch" in sentence


def test_nothing_is_said_of_squares_of_damaged_files_or_where_the_recipe_has_decided(llava: Path) -> None:
    assert warned(llava, (100, 100), (110, 100)) == []
    for padding in ("square", "stretch"):
        assert warned(llava, (400, 100), padding=padding) == []
    settings = ModelFiles(ModelConfig(path=str(llava)), False, False)
    assert cut_off(settings, [Sample("bad", b"no picture", "?", "!"), Sample("none", None, "?", "!")]) == []


def test_nothing_is_said_of_a_model_that_takes_pictures_in_their_own_shape(tmp_path: Path) -> None:
    assert warned(FAMILIES["qwen2_5_vl"](tmp_path), (400, 100)) == []
