"""Pictures made smaller while they are decoded: the same picture, upright and opaque, in memory known beforehand."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.pictures import decode_image
from pipeline.data.smaller_pictures import SCANS, decode_smaller, plan_decoding


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def ramps(width: int = 600, height: int = 400) -> Image.Image:
    """Smooth in both directions, different in every channel."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    down = Image.linear_gradient("L").resize((width, height))
    return Image.merge("RGB", [across, down, Image.blend(across, down, 0.5)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("pixels", [600 * 400, 60_000, 5000])
def test_a_smaller_picture_is_the_whole_one_resized(kind: str, pixels: int) -> None:
    file = encoded(ramps().convert("L") if kind == "GIF" else ramps(), kind)
    plan = plan_decoding(file, pixels)
    picture = decode_smaller(file, plan)
    assert picture.mode == "RGB" and picture.size == plan.smaller
    assert pixels * 0.95 < picture.width * picture.height <= pixels
    expected = decode_image(file).resize(picture.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max() <= (6 if kind == "JPEG" else 2)


@pytest.mark.parametrize("size", [(9000, 20), (20, 9000), (2500, 1300)])
def test_tiles_have_no_seams(size: tuple[int, int]) -> None:
    file = encoded(ramps(*size))
    smaller = decode_smaller(file, plan_decoding(file, size[0] * size[1] // 2))
    expected = decode_image(file).resize(smaller.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(smaller, int) - np.asarray(expected, int)).max() <= 2  # order of rounding


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "I;16"])
def test_every_mode_is_opaque_and_as_bright_as_the_whole_one(mode: str) -> None:
    grey = ramps().convert("L")
    picture = {
        "RGBA": lambda: Image.merge("RGBA", (*ramps().split(), grey)),
        "LA": lambda: Image.merge("LA", (grey, grey)),
        "P": lambda: ramps().quantize(64),
        "1": lambda: grey.point(lambda value: 255 * (value > 99), "1"),
        "I;16": lambda: Image.fromarray(np.asarray(grey, "uint16") * 257),
    }[mode]()
    file = encoded(picture)
    smaller = decode_smaller(file, plan_decoding(file, 60_000))
    expected = decode_image(file).resize(smaller.size, Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(smaller, int) - np.asarray(expected, int)).mean() < 1.5


def test_a_lying_photograph_stands_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encoded(ramps(), "JPEG", exif=exif)
    smaller = decode_smaller(file, plan_decoding(file, 60_000))
    assert smaller.size[0] < smaller.size[1]
    expected = decode_image(file).resize(smaller.size)
    assert np.abs(np.asarray(smaller, int) - np.asarray(expected, int)).max() <= 8


def test_the_longest_side_is_bounded_too() -> None:
    plan = plan_decoding(encoded(Image.new("L", (30000, 100))), 10_000_000, side=3000)
    assert plan.smaller == (3000, 10) and not plan.is_whole


def test_what_decoders_take_is_planned_for_by_format() -> None:
    def planned(picture: Image.Image, kind: str, **options: object) -> float:
        plan = plan_decoding(encoded(picture, kind, **options), 100)
        return plan.nbytes / (plan.width * plan.height)

    picture = ramps(1600, 1200)
    assert planned(picture, "PNG") == pytest.approx(4, abs=0.1)
    assert planned(picture.convert("L"), "PNG") == pytest.approx(1, abs=0.1)
    assert planned(picture, "JPEG") < 0.1  # an eighth of each side
    assert planned(picture, "JPEG", progressive=True) == pytest.approx(6, abs=0.1)
    assert planned(picture, "WEBP") == pytest.approx(16, abs=0.1)


def test_scans_without_end_and_other_formats_are_refused_before_they_are_decoded() -> None:
    whole = encoded(ramps(), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    with pytest.raises(OSError, match="scans"):
        plan_decoding(whole[:last] + whole[last:-2] * SCANS + whole[-2:], 1000)
    with pytest.raises(OSError):
        plan_decoding(encoded(ramps(), "TIFF"), 1000)
