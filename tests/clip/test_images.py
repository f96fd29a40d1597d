"""Pixels: as the checkpoint's processor makes them, or augmented by (seed, epoch, image) alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.clip.images.pixels import Pixels, crop_box, number_of, uniform
from pipeline.errors import UserError
from tests.clip.project import save_model


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Pixels:
    return Pixels(save_model(tmp_path_factory.mktemp("model")))


def picture(width: int = 40, height: int = 30) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(noise)


def test_augmentation_depends_on_seed_epoch_and_image_alone(pixels: Pixels) -> None:
    found = pixels.augmented(picture(), 1, 2, "3.png")
    assert found.shape == (3, 16, 16)
    torch.testing.assert_close(found, pixels.augmented(picture(), 1, 2, "3.png"), rtol=0, atol=0)
    for other in ((2, 2, "3.png"), (1, 3, "3.png"), (1, 2, "4.png")):
        assert not torch.equal(found, pixels.augmented(picture(), *other))


def test_the_whole_picture_is_what_the_plain_path_makes(pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.clip.images.pixels.crop_box", lambda width, height, draws: (0, 0, width, height))
    monkeypatch.setattr("pipeline.clip.images.pixels.uniform", lambda *_: [0.9] * 41)
    torch.testing.assert_close(pixels.augmented(picture(40, 40), 0, 0, "0.png"), pixels.plain(picture(40, 40)))


def test_crops_lie_in_the_picture_and_cover_the_published_share() -> None:
    shares = []
    for image in range(300):
        left, top, right, bottom = crop_box(100, 80, uniform(0, 0, image, 40))
        assert 0 <= left < right <= 100
        assert 0 <= top < bottom <= 80
        shares.append((right - left) * (bottom - top) / 8000)
    assert min(shares) > 0.07
    assert max(shares) > 0.8
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)


def test_a_picture_too_narrow_for_any_crop_gives_its_centre() -> None:
    assert crop_box(10, 1000, [0.999] * 40) == (0, 493, 10, 506)


def test_uniform_numbers_are_pinned() -> None:
    assert number_of("a.png") == 9153304788650147672
    assert uniform(1, 2, 3, 2) == pytest.approx([0.72317396444792, 0.4832980657093866], abs=1e-12)


def test_a_checkpoint_without_an_image_processor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable image processor"):
        Pixels(tmp_path)
