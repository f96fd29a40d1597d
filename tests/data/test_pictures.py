"""What an image file is decoded to: upright, on white, 8 bits, and never more memory than its own pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.data.pictures import SQUARE_SIDE, central, decode_image, is_plain, read_header, squared

RED, BLUE = (255, 0, 0), (0, 0, 255)
STORED = {  # orientation -> how an upright picture is stored with it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """Six by four pixels, the four corners of different colours."""
    picture = Image.new("RGB", (6, 4), (200, 200, 200))
    for place, colour in (((0, 0), RED), ((5, 0), BLUE), ((0, 3), (0, 255, 0)), ((5, 3), (0, 0, 0))):
        picture.putpixel(place, colour)
    return picture


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_is_turned_as_its_orientation_says(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(corners().transpose(STORED[orientation]), kind, exif=exif, **options)
    assert np.array_equal(np.asarray(decode_image(file)), np.asarray(corners()))
    assert (read_header(file).width, read_header(file).height) == (6, 4)
    assert is_plain(file) == (kind == "TIFF")  # which Pillow has always turned


def test_a_photograph_lying_in_its_file_stands_upright():
    upright = Image.new("RGB", (64, 96), RED)
    upright.paste(BLUE, (0, 48, 64, 96))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = decode_image(encoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif))
    assert picture.size == (64, 96)
    pixels = np.asarray(picture)
    assert pixels[5, 32, 0] > 200 and pixels[90, 32, 2] > 200


def test_damaged_exif_does_not_damage_the_picture():
    file = encoded(corners(), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(np.asarray(decode_image(file)), np.asarray(corners())) and is_plain(file)


def drawing(mode: str) -> Image.Image:
    """A black square on a transparent ground whose hidden colour is black too."""
    picture = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (2, 2, 6, 6))
    if mode != "P":
        return picture.convert(mode)
    indexed = Image.new("P", (8, 8), 0)
    indexed.putpalette([0, 0, 0, 0, 0, 0])
    indexed.paste(1, (2, 2, 6, 6))
    return indexed


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("P", "PNG", {"transparency": 0}),
        ("P", "GIF", {"transparency": 0}),
        ("RGBA", "TIFF", {}),
    ],
)
def test_what_is_transparent_is_white_in_every_format(mode, kind, options):
    file = encoded(drawing(mode), kind, **options)
    picture = decode_image(file)
    assert picture.mode == "RGB"
    assert picture.getpixel((0, 0)) == (255, 255, 255) and picture.getpixel((4, 4)) == (0, 0, 0)
    assert not is_plain(file)


def test_half_transparent_pixels_are_mixed_with_white():
    file = encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128)))
    assert decode_image(file).getpixel((0, 0)) == (127, 127, 127)


def test_a_colour_named_transparent_is_white():
    picture = corners()
    file = encoded(picture, transparency=RED)
    assert decode_image(file).getpixel((0, 0)) == (255, 255, 255) and decode_image(file).getpixel((5, 0)) == BLUE


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("RGB", "PNG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG"), ("CMYK", "JPEG"), ("RGBA", "PNG")],
)
def test_ordinary_pictures_are_what_they_always_were(mode, kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    file = encoded(noise.convert(mode), kind)
    with Image.open(io.BytesIO(file)) as image:
        before = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(decode_image(file)), before) and is_plain(file)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_divided_down(kind):
    values = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    file = encoded(Image.fromarray(values), kind)
    assert np.asarray(decode_image(file))[..., 1].ravel().tolist() == list(range(256)) and not is_plain(file)


def test_floating_point_pixels_are_spread_over_their_range():
    file = encoded(Image.fromarray(np.array([[-3.0, 1.0, 5.0]], dtype=np.float32)), "TIFF")
    assert np.asarray(decode_image(file))[0, :, 0].tolist() == [0, 128, 255]


def test_the_middle_of_an_elongated_picture_has_bounded_sides():
    assert central(Image.new("RGB", (20000, 10))).size == (500, 10)
    assert central(Image.new("RGB", (1, 3001))).size == (1, 49)  # as much cut off above as below
    ordinary = Image.new("RGB", (400, 8))
    assert central(ordinary) is ordinary


def test_the_middle_keeps_the_centre():
    picture = Image.new("RGB", (1001, 4), RED)
    picture.putpixel((500, 2), BLUE)
    middle = central(picture)
    assert middle.getpixel((middle.width // 2, 2)) == BLUE


def test_squares_of_ordinary_pictures_are_not_resized_and_those_of_long_ones_are_bounded():
    square = squared(corners(), (9, 9, 9))
    assert square.size == (6, 6) and square.getpixel((0, 0)) == (9, 9, 9) and square.getpixel((0, 1)) == RED
    assert squared(Image.new("RGB", (100000, 160)), (9, 9, 9)).size == (SQUARE_SIDE, SQUARE_SIDE)


def test_clip_gets_the_middle_of_elongated_pictures_in_routing_and_in_benchmarks(tmp_path):
    from pipeline.backbones.clip import KeyEncoder
    from pipeline.clip.images.pixels import Pixels
    from tests.tiny_clip import save_clip

    class Seen:
        image_processor = size = None

        def __call__(self, images, return_tensors):
            self.size = images[0].size
            return {"pixel_values": np.zeros((1, 3, 4, 4), dtype=np.float32)}

    save_clip(tmp_path)
    for reader in (KeyEncoder(tmp_path), Pixels(tmp_path)):
        reader.processor = seen = Seen()
        picture = Image.new("RGB", (20000, 10))
        reader.pixels([picture]) if isinstance(reader, KeyEncoder) else reader.plain(picture)
        assert seen.size == (500, 10)
