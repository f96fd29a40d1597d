"""Draws the scenes of the embedded models and tasks: shapes, handwritten digits, letters, bar charts.

A scene is an RGB image of 48 x 48 pixels with its annotation (objects and their boxes). The handwritten digits are the
1,797 scans that scikit-learn ships, divided into those for the base model and those for the tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 48  # pixels per side
GRID = 4  # boxes of objects are multiples of this many pixels, so that a box is a short answer
CELL = 8  # positions of digits and letters are multiples of this many pixels, the patch size of the vision tower
FAMILIES = ("shapes", "digit", "text", "chart")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (235, 210, 50),
    "purple": (150, 60, 190),
    "cyan": (60, 205, 215),
    "orange": (245, 135, 35),
}
LETTERS = "BDFHKLMPRTXZ"  # without vowels, so that no string of letters is a word that is one token
# Pairs that are one token, because English words contain them; images never show them.
MERGED_PAIRS = ("DD", "FT", "HT", "LD", "LL", "LT", "RT", "TH", "TT")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PARTS = {"base": slice(0, 447), "train": slice(447, 1447), "test": slice(1447, 1797)}


@dataclass(frozen=True)
class Thing:
    """A drawn object: shape, colour, and box in pixels (left, top, right, bottom)."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]


@dataclass
class Scene:
    """An image and its annotation; `things` are shapes, or the bars of a chart from left to right."""

    family: str
    image: np.ndarray  # [SIZE, SIZE, 3] uint8
    things: list[Thing] = field(default_factory=list)
    digit: int | None = None
    colour: str | None = None  # ink of a digit or of letters
    letters: str | None = None


@cache
def handwritten_digits() -> tuple[np.ndarray, np.ndarray]:
    """The scans in a fixed random order: images [1797, 8, 8] in 0..16 and labels [1797]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(1797).permutation(len(bunch.target))
    return bunch.images[order], bunch.target[order]


def _tint(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    jitter = rng.integers(-18, 19, size=3)
    red, green, blue = (int(v) for v in np.clip(np.array(COLOURS[colour]) + jitter, 0, 255))
    return red, green, blue


def _background(rng: np.random.Generator) -> tuple[int, int, int]:
    level = int(rng.integers(8, 60)) if rng.random() < 0.5 else int(rng.integers(205, 250))
    return level, level, level


def _finish(rng: np.random.Generator, canvas: Image.Image) -> np.ndarray:
    """Reduces a canvas of twice the size and adds weak noise, so that no two images are equal."""
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)
    return np.clip(pixels + rng.normal(0, 4, pixels.shape), 0, 255).astype(np.uint8)


def _draw_thing(
    draw: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], ink: tuple[int, int, int]
) -> None:
    left, top, right, bottom = (2 * v for v in box)
    right, bottom = right - 1, bottom - 1
    width, middle_x, middle_y = right - left, (left + right) / 2, (top + bottom) / 2
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=ink)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=ink)
    elif shape == "triangle":
        draw.polygon([(middle_x, top), (right, bottom), (left, bottom)], fill=ink)
    elif shape == "cross":
        arm = width * 0.17
        draw.rectangle((middle_x - arm, top, middle_x + arm, bottom), fill=ink)
        draw.rectangle((left, middle_y - arm, right, middle_y + arm), fill=ink)
    else:
        draw.ellipse((left, top, right, bottom), outline=ink, width=max(4, round(width * 0.17)))


def draw_shapes(rng: np.random.Generator) -> Scene:
    """One to five shapes that do not overlap; sides are 12 to 20 pixels, boxes multiples of GRID pixels."""
    wanted = int(rng.integers(1, 6))
    canvas = Image.new("RGB", (2 * SIZE, 2 * SIZE), _background(rng))
    draw = ImageDraw.Draw(canvas)
    things: list[Thing] = []
    taken: list[tuple[int, int, int, int]] = []
    for _ in range(60):
        if len(things) == wanted:
            break
        side = int(rng.choice((12, 16, 20) if wanted < 4 else (12, 16)))
        left, top = (int(v) * GRID for v in rng.integers(0, (SIZE - side) // GRID + 1, size=2))
        box = (left, top, left + side, top + side)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        thing = Thing(str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))), box)
        _draw_thing(draw, thing.shape, box, _tint(rng, thing.colour))
        things.append(thing)
    return Scene("shapes", _finish(rng, canvas), things)


def draw_digit(rng: np.random.Generator, part: str = "base", index: int | None = None) -> Scene:
    """A handwritten digit in a random colour, scale, rotation (up to 10 degrees) and position."""
    images, labels = handwritten_digits()
    images, labels = images[DIGIT_PARTS[part]], labels[DIGIT_PARTS[part]]
    which = int(rng.integers(len(labels))) if index is None else index
    side = int(rng.choice((64, 80)))  # on the doubled canvas
    scan = Image.fromarray((images[which] * (255 / 16)).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    mask = scan.rotate(float(rng.uniform(-10, 10)), resample=Image.Resampling.BILINEAR)
    colour = str(rng.choice(list(COLOURS)))
    canvas = Image.new("RGB", (2 * SIZE, 2 * SIZE), _background(rng))
    left, top = (2 * CELL * int(v) for v in rng.integers(0, (2 * SIZE - side) // (2 * CELL) + 1, size=2))
    canvas.paste(Image.new("RGB", (side, side), _tint(rng, colour)), (left, top), mask)
    return Scene("digit", _finish(rng, canvas), digit=int(labels[which]), colour=colour)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def draw_text(rng: np.random.Generator) -> Scene:
    """Two or three capital letters in a row."""
    count = int(rng.integers(2, 4))
    letters = "".join(rng.choice(list(LETTERS), size=count))
    while any(pair in letters for pair in MERGED_PAIRS):
        letters = "".join(rng.choice(list(LETTERS), size=count))
    colour = str(rng.choice(list(COLOURS)))
    canvas = Image.new("RGB", (2 * SIZE, 2 * SIZE), _background(rng))
    draw = ImageDraw.Draw(canvas)
    cell, size = 4 * CELL, int(rng.integers(34, 41))
    left = 2 * CELL * int(rng.integers(0, (2 * SIZE - cell * count) // (2 * CELL) + 1))
    top = 2 * CELL * int(rng.integers(0, 4)) + 2
    ink = _tint(rng, colour)
    for slot, letter in enumerate(letters):
        x = left + cell * slot + cell / 2 + float(rng.uniform(-1, 1))
        draw.text(
            (x, top + float(rng.uniform(-2, 2))),
            letter,
            fill=ink,
            font=_font(size),
            anchor="mt",
            stroke_width=1,
            stroke_fill=ink,
        )
    return Scene("text", _finish(rng, canvas), letters=letters, colour=colour)


def draw_chart(rng: np.random.Generator) -> Scene:
    """A chart of three to five bars of different colours; the tallest and the shortest differ from the others."""
    count = int(rng.integers(3, 6))
    colours = [str(c) for c in rng.permutation(list(COLOURS))[:count]]
    levels = rng.integers(2, 10, size=count)
    while (levels == levels.max()).sum() > 1 or (levels == levels.min()).sum() > 1:
        levels = rng.integers(2, 10, size=count)
    canvas = Image.new("RGB", (2 * SIZE, 2 * SIZE), _background(rng))
    draw = ImageDraw.Draw(canvas)
    pitch = SIZE // count
    floor = SIZE - 4
    things = []
    for slot, (colour, level) in enumerate(zip(colours, levels, strict=True)):
        box = (slot * pitch + 1, floor - GRID * int(level), (slot + 1) * pitch - 2, floor)
        draw.rectangle([2 * v for v in box], fill=_tint(rng, colour))
        things.append(Thing("bar", colour, box))
    draw.line((0, 2 * floor + 1, 2 * SIZE, 2 * floor + 1), fill=(128, 128, 128), width=2)
    return Scene("chart", _finish(rng, canvas), things)


DRAW = {"shapes": draw_shapes, "digit": draw_digit, "text": draw_text, "chart": draw_chart}
