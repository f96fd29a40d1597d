"""Draws the pictures of shapes and of words on which the projector is aligned, with what is at each place."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 224  # pixels
PLACES = 7  # features per side
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "heart", "diamond")
COLORS = {
    "red": (215, 30, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 215),
    "yellow": (240, 215, 30),
    "orange": (245, 135, 25),
    "purple": (140, 50, 180),
    "pink": (245, 130, 185),
    "brown": (125, 75, 35),
    "gray": (128, 128, 128),
    "black": (15, 15, 15),
    "white": (248, 248, 248),
}
WORDS = (
    "open close north south hotel music train apple river stone table green paper light market school coffee garden "
    "window number street bridge silver summer winter yellow doctor dinner planet travel"
).split()
FADE = 20  # deviation of a colour's channels, of 255


@dataclass(frozen=True)
class Thing:
    """A drawn shape: its box is (left, top, right, bottom) in pixels."""

    shape: str
    color: str
    box: tuple[int, int, int, int]

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2 / SIDE, (top + bottom) / 2 / SIDE


@dataclass(frozen=True)
class Drawing:
    """A picture and what it shows: shapes, or a printed text, on a ground of one colour."""

    picture: Image.Image
    ground: str
    things: tuple[Thing, ...] = ()
    text: str = ""
    ink: str = ""
    text_box: tuple[int, int, int, int] = field(default=(0, 0, 0, 0))

    def at(self, row: int, column: int) -> tuple[str, ...]:
        """The words for what covers the middle of a place."""
        cell = SIDE / PLACES
        x, y = (column + 0.5) * cell, (row + 0.5) * cell
        for thing in self.things:
            if _within(thing.box, x, y):
                return thing.color, thing.shape
        if self.text and _within(self.text_box, x, y):
            return self.ink, self.text
        return (self.ground,)


def _within(box: tuple[int, int, int, int], x: float, y: float) -> bool:
    return box[0] <= x < box[2] and box[1] <= y < box[3]


def draw(rng: np.random.Generator) -> Drawing:
    """A picture of one to four shapes, or, one time in six, of a word or a number."""
    return draw_text(rng) if rng.random() < 1 / 6 else draw_shapes(rng)


def draw_shapes(rng: np.random.Generator) -> Drawing:
    """One to four shapes that do not overlap."""
    ground = _pick(rng, ("white", "white", "black", "gray", *COLORS))
    colors = [name for name in COLORS if name != ground]
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), _tint(rng, ground))
    pen = ImageDraw.Draw(canvas)
    wanted = int(rng.choice((1, 1, 2, 2, 3, 4)))
    things: list[Thing] = []
    for _ in range(40):
        if len(things) == wanted:
            break
        size = int(rng.integers(48, 150 if wanted == 1 else 100))
        left, top = (int(v) for v in rng.integers(4, SIDE - size - 4, size=2))
        box = (left, top, left + size, top + size)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in (t.box for t in things)):
            continue
        thing = Thing(_pick(rng, SHAPES), _pick(rng, colors), box)
        _draw_shape(pen, thing.shape, box, _tint(rng, thing.color), float(rng.uniform(-0.25, 0.25)))
        things.append(thing)
    return Drawing(_finish(rng, canvas), ground, tuple(things))


def draw_text(rng: np.random.Generator) -> Drawing:
    """A word or a number of one to four digits."""
    ground = _pick(rng, ("white", "white", "yellow", "gray", "black", "blue"))
    ink = _pick(rng, [name for name in COLORS if name not in (ground, "gray")])
    text = _pick(rng, WORDS) if rng.random() < 0.6 else str(int(rng.integers(0, 10 ** int(rng.integers(1, 5)))))
    canvas = Image.new("RGB", (2 * SIDE, 2 * SIDE), _tint(rng, ground))
    pen = ImageDraw.Draw(canvas)
    font = _font(int(min(150, 560 / max(2, len(text)))))
    left, top, right, bottom = (int(v) for v in pen.textbbox((0, 0), text, font=font))
    x = int(rng.integers(0, max(1, 2 * SIDE - (right - left)))) - left
    y = int(rng.integers(0, max(1, 2 * SIDE - (bottom - top)))) - top
    pen.text((x, y), text, fill=_tint(rng, ink), font=font)
    box = ((x + left) // 2, (y + top) // 2, (x + right) // 2, (y + bottom) // 2)
    return Drawing(_finish(rng, canvas), ground, text=text, ink=ink, text_box=box)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _pick(rng: np.random.Generator, names: tuple[str, ...] | list[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _tint(rng: np.random.Generator, color: str) -> tuple[int, int, int]:
    red, green, blue = (int(v) for v in np.clip(np.array(COLORS[color]) + rng.normal(0, FADE / 2, 3), 0, 255))
    return red, green, blue


def _finish(rng: np.random.Generator, canvas: Image.Image) -> Image.Image:
    pixels = np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    noise = rng.normal(0, float(rng.uniform(0, 6)), pixels.shape)
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


# Corners of the shapes around (0, 0), half a side being 1.
_CORNERS: dict[str, list[list[tuple[float, float]]]] = {
    "square": [[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]],
    "triangle": [[(0, -1), (0.95, 0.85), (-0.95, 0.85)]],
    "diamond": [[(0, -1), (0.75, 0), (0, 1), (-0.75, 0)]],
    "cross": [[(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)], [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)]],
    "star": [
        [(np.sin(k * np.pi / 5) * (1, 0.42)[k % 2], -np.cos(k * np.pi / 5) * (1, 0.42)[k % 2]) for k in range(10)]
    ],
    "heart": [
        [
            (np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16)
            for t in np.linspace(0, 2 * np.pi, 40)
        ]
    ],
}


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], ink: tuple[int, int, int], turn: float
) -> None:
    left, top, right, bottom = (2 * v for v in box)
    x, y, half = (left + right) / 2, (top + bottom) / 2, (right - left) / 2
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=ink)
    elif shape == "ring":
        pen.ellipse((left, top, right, bottom), outline=ink, width=max(6, round(0.36 * half)))
    else:
        cos, sin, scale = np.cos(turn), np.sin(turn), 0.85 * half  # smaller, so that a turned shape stays in its box
        for corners in _CORNERS[shape]:
            pen.polygon(
                [(x + scale * (u * cos - v * sin), y + scale * (u * sin + v * cos)) for u, v in corners], fill=ink
            )
