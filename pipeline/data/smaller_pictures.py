"""Decodes pictures at reduced size, in an amount of memory that is computed from their header.

For servers, whose callers choose the picture. The JPEG decoder itself reduces to a half, quarter or eighth. Pictures
that are decoded at full size are made opaque and reduced tile by tile, so that only the decoder's copy is large.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import ceil, floor, sqrt

from PIL import Image

from pipeline.data.pictures import opaque, orientation_of, upright

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # formats with known memory needs; Pillow reads some fifty
TILE = (1024, 64)  # columns and rows per tile
MARGIN = 4  # pixels of the reduced picture around a tile that the filter reads too
# Bytes per pixel of a Pillow image by mode, and by format where the decoder needs more.
MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2}
FORMAT_BYTES = {"WEBP": 16, "GIF": 6}
WORK_BYTES = 16  # per pixel of the reduced picture, for transparency and copies in image processors
SCANS = 100  # most scans of a progressive JPEG; usual ones have about ten, and each scan costs a pass over all pixels


@dataclass(frozen=True)
class Decoding:
    """How a picture will be decoded: its format and stored size, its reduced size, and the memory for it in bytes."""

    format: str
    width: int
    height: int
    smaller: tuple[int, int]
    nbytes: int

    @property
    def is_whole(self) -> bool:
        """Whether the picture is not reduced."""
        return self.smaller == (self.width, self.height)


def plan_decoding(encoded: bytes, pixels: int, side: int | None = None) -> Decoding:
    """Plan from the header to decode at most `pixels` pixels, and sides of at most `side`.

    Raises OSError, or one of Pillow's other errors, for data that is no image of FORMATS.
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
    """Decode an image file to its upright RGB picture, reduced to the planned size before it is turned.

    Raises the errors of `plan_decoding`.
    """
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
    """The largest divisor (1, 2, 4, 8) of the JPEG decoder that still gives at least the reduced size."""
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
    """The source of a tile along one axis: the range of whole pixels with a margin, and the exact range in it."""
    begin, end = first * length / smaller, (first + number) * length / smaller
    margin = ceil(MARGIN * length / smaller)
    return (max(0, floor(begin) - margin), min(length, ceil(end) + margin)), (begin, end)
