"""Decodes image files to RGB pictures: upright, opaque, 8 bits per channel.

All of the project decodes images here, so that a file is the same picture everywhere: rotated by its EXIF orientation,
transparency on white, and 16-bit values scaled to 8 bits, as viewers show it. The memory for elongated pictures is
bounded here too: image processors that resize the shorter side, and padding to a square, would need memory for the
square of the longer side.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING = (5, 6, 7, 8)  # orientations that exchange width and height
# Chunks with an orientation. Pillow would decode a whole PNG to search for them after its pixels.
PNG_ORIENTED = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
# Bytes 4 to 12 of HEIC files, the format of phones' photographs, which Pillow cannot read.
HEIC = (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftyphevc", b"ftypmif1", b"ftypmsf1")
DEEP = ("I", "F")  # first letters of modes with more than 8 bits per channel
MOST_RATIO = 50  # largest ratio of a picture's sides; `central` cuts the ends off others
SQUARE_SIDE = 4096  # longest side that is padded to a square without reduction; 12-megapixel photographs have 4032


@dataclass(frozen=True)
class ImageHeader:
    """The format of an image file and the size of its upright picture in pixels, from the file's header."""

    format: str
    width: int
    height: int


def decode_image(encoded: bytes) -> Image.Image:
    """Decode an image file to its upright RGB picture; of an animation, the first frame.

    Raises OSError, or one of Pillow's other errors, when the file is damaged or has more pixels than Pillow's limit
    (179 million).
    """
    with _opened(encoded) as image:
        orientation = orientation_of(image, encoded)
        picture = opaque(image)
    return upright(picture, orientation)


def read_header(encoded: bytes) -> ImageHeader:
    """Read format and upright size without decoding pixels; raises the errors of `decode_image`."""
    with _opened(encoded) as image:
        width, height = image.size
        if orientation_of(image, encoded) in SWAPPING:
            width, height = height, width
        return ImageHeader(image.format or "img", width, height)


def is_plain(encoded: bytes) -> bool:
    """Whether the picture is used as it is stored: no rotation, no transparency, 8 bits.

    Raises the errors of `decode_image`.
    """
    with _opened(encoded) as image:
        if orientation_of(image, encoded) in TURNS or image.mode.startswith(DEEP):
            return False
        return not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema() == (255, 255)


def _opened(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:  # its message is the address of the BytesIO object
        kind = "HEIC, as phones save photographs" if is_heic(encoded) else "no known image format"
        raise UnidentifiedImageError(kind) from None


def is_heic(encoded: bytes) -> bool:
    """Whether a file is a HEIC image, which has to be converted to JPEG first."""
    return encoded[4:12] in HEIC


def central(picture: Image.Image) -> Image.Image:
    """The centre of a picture whose sides have a ratio above MOST_RATIO, else the picture itself.

    For image processors that resize the shorter side and then crop the central square: the result is the same, without
    an intermediate picture of 672000 x 336 pixels for one of 20000 x 10.
    """
    width, height = picture.size
    wide, high = _within(width, MOST_RATIO * height), _within(height, MOST_RATIO * width)
    if (wide, high) == (width, height):
        return picture
    left, top = (width - wide) // 2, (height - high) // 2
    return picture.crop((left, top, left + wide, top + high))


def squared(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of this colour.

    A longer side than SQUARE_SIDE is reduced first: models use a few hundred pixels of it, and a square of 100000
    pixels per side would take 30 GB.
    """
    width, height = picture.size
    if width == height:
        return picture
    longest = max(width, height)
    side = min(longest, SQUARE_SIDE)
    if side < longest:
        width, height = (max(1, round(length * side / longest)) for length in (width, height))
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (side, side), colour)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square


def _within(length: int, most: int) -> int:
    """`length`, or the largest length up to `most` with the same number of pixels cut off at either end."""
    return length if length <= most else most - (length - most) % 2


def upright(picture: Image.Image, orientation: int) -> Image.Image:
    """The picture rotated or flipped by its EXIF orientation."""
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def orientation_of(image: Image.Image, encoded: bytes) -> int:
    """The EXIF orientation of an opened file, 1 where it has none or an unknown one."""
    if image.format == "TIFF":  # Pillow applies the orientation of TIFF files itself
        return 1
    if image.format == "PNG" and not any(mark in encoded for mark in PNG_ORIENTED):
        return 1
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata of an intact image; Pillow raises many kinds of errors
        return 1
    return found if found in TURNS else 1


def opaque(image: Image.Image) -> Image.Image:
    """An opened file, or a part of one, as RGB: transparency on white, more than 8 bits scaled down."""
    if image.mode.startswith(DEEP):
        return _eight_bits(image).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    alpha = layer.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return layer.convert("RGB")
    ground = Image.new("RGB", layer.size, WHITE)
    ground.paste(layer, mask=alpha)
    return ground


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey values of 16 or 32 bits or floating point as 8 bits, scaled by the type's range where it is known."""
    values = image.convert("F") if image.mode != "F" else image.copy()
    low, high = np.asarray(values).min().item(), np.asarray(values).max().item()
    if image.mode == "F" or not 0 <= low <= high <= 65535:  # unknown range: scale from the lowest to the highest value
        span = high - low
        unit = low >= 0.0 and high <= 1.0
        offset, scale = (0.0, 255.0) if unit else (low, 255.0 / span if span else 0.0)
    else:
        offset, scale = 0.0, 255.0 / 65535.0
    # convert("L") truncates, so one half is added to round.
    return values.point(lambda value: value * scale + (0.5 - offset * scale)).convert("L")
