"""Pictures decoded to fewer pixels than they have, in memory that their header foretells.

For services, whose callers choose the picture. A JPEG is decoded at a half, quarter or eighth by its own decoder. What
is decoded whole is made opaque and smaller in bands, so that the one large copy is the decoder's.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import ceil, floor, sqrt

from PIL import Image

from pipeline.data.pictures import opaque, orientation_of, upright

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # whose memory is known; Pillow reads some fifty
BAND = 64  # rows made at once
MARGIN = 4  # further rows of the original on either side, which the filter reads
# Bytes per pixel that Pillow takes for an image: by mode, and by format where its decoder needs more.
MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}
FORMAT_BYTES = {"WEBP": 16, "GIF": 6}
WORK_BYTES = 16  # per pixel of the smaller picture: transparency, and what image processors copy
SCANS = 100  # of a progressive JPEG, which has about ten; every one of thousands would pass over all pixels


@dataclass(frozen=True)
class Decoding:
    """How a picture will be decoded: its upright size as stored, the size it gets, and the bytes that this takes."""

    format: str
    width: int
    height: int
    smaller: tuple[int, int]
    nbytes: int

    @property
    def is_whole(self) -> bool:
        """Whether the picture keeps its size."""
        return self.smaller == (self.width, self.height)


def plan_decoding(encoded: bytes, pixels: int, side: int | None = None) -> Decoding:
    """Read the header and plan for at most so many pixels, and sides of at most `side`; no pixel is decoded.

    Raises OSError, or one of Pillow's other errors, for what is no image of FORMATS.
    """
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        width, height = image.size
        kind, mode = str(image.format), image.mode
        components = len(image.getbands())
    smaller = _fitted(width, height, pixels, side)
    stored = width * height
    whole = stored * FORMAT_BYTES.get(kind, MODE_BYTES.get(mode, 4))
    if kind == "JPEG":
        scans = encoded.count(b"\xff\xda")  # in compressed data every ff is followed by 00
        if scans > SCANS:
            raise OSError(f"it has {scans} scans")
        reduced = _draft(width, height, smaller)
        whole = ceil(width / reduced) * ceil(height / reduced) * MODE_BYTES.get(mode, 4)
        if scans > 1:  # progressive: all coefficients are kept until the last scan, at full size
            whole += 2 * components * stored
    work = smaller[0] * smaller[1] * WORK_BYTES
    return Decoding(kind, width, height, smaller, max(whole + work // 2, work))


def decode_smaller(encoded: bytes, plan: Decoding) -> Image.Image:
    """Decode an image file to its upright RGB picture of the planned size (before it is turned); errors as above."""
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        orientation = orientation_of(image, encoded)
        if plan.format == "JPEG":
            reduced = _draft(plan.width, plan.height, plan.smaller)
            image.draft(None, (plan.width // reduced, plan.height // reduced))
        image.load()
        picture = _in_bands(image, plan.smaller)
    return upright(picture, orientation)


def _fitted(width: int, height: int, pixels: int, side: int | None) -> tuple[int, int]:
    scale = min(1.0, sqrt(pixels / (width * height)))
    if side is not None:
        scale = min(scale, side / max(width, height))
    if scale == 1.0:
        return width, height
    return max(1, floor(width * scale)), max(1, floor(height * scale))


def _draft(width: int, height: int, smaller: tuple[int, int]) -> int:
    """The power of two, up to 8, by which a JPEG's decoder may divide so that nothing wanted is lost."""
    most = min(width / smaller[0], height / smaller[1])
    return next(power for power in (8, 4, 2, 1) if power <= most)


def _in_bands(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return opaque(image)
    (width, height), (wide, high) = image.size, size
    picture = Image.new("RGB", size)
    for first in range(0, high, BAND):
        last = min(high, first + BAND)
        upper, lower = first * height / high, last * height / high
        margin = ceil(MARGIN * height / high)
        top, bottom = max(0, floor(upper) - margin), min(height, ceil(lower) + margin)
        band = opaque(image.crop((0, top, width, bottom)))
        box = (0, upper - top, width, lower - top)
        picture.paste(band.resize((wide, last - first), Image.Resampling.BICUBIC, box=box), (0, first))
    return picture
