"""From the bytes of an image file to the RGB picture that every part works with: upright, opaque, 8 bits a channel.

Preparing, training, answering, the service, the benchmarks and the pages that show pictures all decode here, so a file
is the same picture everywhere: turned as its EXIF orientation says, transparency laid on white, and 16-bit values
divided down, as viewers show it. What models do with elongated pictures is bounded here as well: image processors that
resize the shorter side, and padding to a square, would need memory for the longer side squared.
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
SWAPPING = (5, 6, 7, 8)  # orientations whose upright picture is as wide as the stored one is high
# Without one of these a PNG has no orientation; Pillow would decode it whole to look behind its pixels.
PNG_ORIENTED = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")
# What bytes 4 to 12 of a HEIC file are, as which phones save photographs; Pillow reads none.
HEIC = (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftyphevc", b"ftypmif1", b"ftypmsf1")
DEEP = ("I", "F")  # first letters of modes with more than 8 bits a channel
MOST_RATIO = 50  # of a picture's sides, beyond which `central` cuts its ends off
SQUARE_SIDE = 4096  # longest side that is padded to a square as it is; a phone's 12 megapixels have 4032


@dataclass(frozen=True)
class ImageHeader:
    """What the beginning of an image file says: its format, and the size of the upright picture in pixels."""

    format: str
    width: int
    height: int


def decode_image(encoded: bytes) -> Image.Image:
    """Decode an image file to its upright RGB picture; of several frames the first.

    Raises OSError, or one of Pillow's other errors, when the bytes are not a whole image or hold more pixels than
    Pillow reads (179 million).
    """
    with _opened(encoded) as image:
        orientation = orientation_of(image, encoded)
        picture = opaque(image)
    return upright(picture, orientation)


def read_header(encoded: bytes) -> ImageHeader:
    """Read format and upright size, decoding no pixels; errors as `decode_image`."""
    with _opened(encoded) as image:
        width, height = image.size
        if orientation_of(image, encoded) in SWAPPING:
            width, height = height, width
        return ImageHeader(image.format or "img", width, height)


def is_plain(encoded: bytes) -> bool:
    """Whether the picture is what is stored: not turned, nothing transparent, 8 bits; errors as `decode_image`."""
    with _opened(encoded) as image:
        if orientation_of(image, encoded) in TURNS or image.mode.startswith(DEEP):
            return False
        return not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema() == (255, 255)


def _opened(encoded: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:  # names the place in memory where the bytes lie
        kind = "HEIC, as phones save photographs" if is_heic(encoded) else "no known image format"
        raise UnidentifiedImageError(kind) from None


def is_heic(encoded: bytes) -> bool:
    """Whether a file is a HEIC picture, which has to be saved as JPEG first."""
    return encoded[4:12] in HEIC


def central(picture: Image.Image) -> Image.Image:
    """The middle of a picture whose sides differ more than MOST_RATIO times, else the picture itself.

    For image processors that resize the shorter side and then cut the central square out: what they see is the same,
    and 20000 x 10 pixels do not become 672000 x 336 in between.
    """
    width, height = picture.size
    wide, high = _within(width, MOST_RATIO * height), _within(height, MOST_RATIO * width)
    if (wide, high) == (width, height):
        return picture
    left, top = (width - wide) // 2, (height - high) // 2
    return picture.crop((left, top, left + wide, top + high))


def squared(picture: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of this colour.

    A side beyond SQUARE_SIDE is made smaller first: models see some hundred pixels of it, and the square of 100000
    pixels would take 30 GB.
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
    """`length`, or what fits into `most` with as much cut off at either end."""
    return length if length <= most else most - (length - most) % 2


def upright(picture: Image.Image, orientation: int) -> Image.Image:
    """The picture turned as its orientation says."""
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def orientation_of(image: Image.Image, encoded: bytes) -> int:
    """The EXIF orientation of an opened file, 1 where it says none that is known."""
    if image.format == "TIFF":  # Pillow turns these itself
        return 1
    if image.format == "PNG" and not any(mark in encoded for mark in PNG_ORIENTED):
        return 1
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata of a whole image; Pillow raises many kinds
        return 1
    return found if found in TURNS else 1


def opaque(image: Image.Image) -> Image.Image:
    """An opened file, or a part of one, as RGB: transparency laid on white, more than 8 bits divided down."""
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
    """Grey values of 16 or 32 bits, or floating point, as 8 bits: by the type's range where it is known."""
    values = image.convert("F") if image.mode != "F" else image.copy()
    low, high = np.asarray(values).min().item(), np.asarray(values).max().item()
    if image.mode == "F" or not 0 <= low <= high <= 65535:  # any range: from the darkest to the brightest
        span = high - low
        unit = low >= 0.0 and high <= 1.0
        offset, scale = (0.0, 255.0) if unit else (low, 255.0 / span if span else 0.0)
    else:
        offset, scale = 0.0, 255.0 / 65535.0
    # Without dither or clipping of Pillow's own: adding one half makes truncation round.
    return values.point(lambda value: value * scale + (0.5 - offset * scale)).convert("L")
