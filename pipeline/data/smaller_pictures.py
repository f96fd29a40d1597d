"""Pictures decoded to fewer pixels than they have, in memory that their header foretells.

For services, whose callers choose the picture. A JPEG is decoded at a half, quarter or eighth by its own decoder. What
is decoded whole is made opaque and smaller tile by tile, so that the one large copy is the decoder's.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import ceil, floor, sqrt

from PIL import Image

from pipeline.data.pictures import opaque, orientation_of, upright

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # whose memory is known; Pillow reads some fifty
TILE = (1024, 64)  # columns and rows made at once
MARGIN = 4  # further pixels of the smaller picture's size on either side, which the filter reads
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
        picture = _in_tiles(image, plan.smaller)
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


def _in_tiles(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return opaque(image)
    picture = Image.new("RGB", size)
    for left, columns in _spans(size[0], TILE[0]):
        for top, rows in _spans(size[1], TILE[1]):
            across, wide = _source(left, columns, size[0], image.width)
            down, high = _source(top, rows, size[1], image.height)
            tile = opaque(image.crop((across[0], down[0], across[1], down[1])))
            box = (wide[0] - across[0], high[0] - down[0], wide[1] - across[0], high[1] - down[0])
            picture.paste(tile.resize((columns, rows), Image.Resampling.BICUBIC, box=box), (left, top))
    return picture


def _spans(length: int, most: int) -> list[tuple[int, int]]:
    return [(first, min(most, length - first)) for first in range(0, length, most)]


def _source(first: int, number: int, smaller: int, length: int) -> tuple[tuple[int, int], tuple[float, float]]:
    """Which pixels of the original a tile is made of: the whole ones with a margin, and where exactly in them."""
    begin, end = first * length / smaller, (first + number) * length / smaller
    margin = ceil(MARGIN * length / smaller)
    return (max(0, floor(begin) - margin), min(length, ceil(end) + margin)), (begin, end)
