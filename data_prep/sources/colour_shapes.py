"""A generated base-to-new dataset: images of one coloured shape each, whose classes combine a colour and a shape.

Base and new classes each have every colour and every shape; new classes are combinations that training lacks. The
images differ from those that the embedded CLIP was trained on: shapes are rotated and faded, on a spotted background.
Layout as CoOp's datasets: `<root>/colour_shapes/{images/, split_zhou_ColourShapes.json}`; the second split file
`split_zhou_UnevenShapes.json` is a pool with frequent and rare classes, of the same images.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_prep.nano.scenes import COLOURS, SHAPES, SIZE
from pipeline.files.atomic import replacing

NAME, SPLIT_FILE = "colour_shapes", "split_zhou_ColourShapes.json"
UNEVEN_FILE = "split_zhou_UnevenShapes.json"  # the same images, of most classes fewer to train on
UNEVEN_FEWEST = 2  # training images of the rarest class there; the most frequent one keeps all
FINGERPRINT_FILE = "made_from.json"
VERSION = 1  # increase it when the images change
PER_CLASS = {"train": 20, "val": 4, "test": 20}  # images
SCALE = 4  # images are drawn larger by this factor and then reduced, for smooth edges
FADED = (0.0, 0.2)  # range of the background's share in a shape's colour
SPOTS = 6  # grey spots in the background
NOISE = 6.0  # standard deviation of the noise of each pixel, of 255


def class_names() -> list[str]:
    """The classes in the order of their labels, base classes (an even sum of colour and shape number) first."""
    pairs = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES))]
    ordered = sorted(pairs, key=lambda pair: ((pair[0] + pair[1]) % 2, pair))
    return [f"{list(COLOURS)[colour]}_{SHAPES[shape]}" for colour, shape in ordered]


def draw(root: Path, seed: int) -> Path:
    """Draw the dataset under `root` unless it exists there with this seed; returns its folder."""
    folder = root / NAME
    made_from = {"seed": seed, "version": VERSION, "per_class": PER_CLASS}
    if (folder / FINGERPRINT_FILE).is_file() and json.loads((folder / FINGERPRINT_FILE).read_text()) == made_from:
        _write_uneven(folder, seed)
        return folder
    for file in (FINGERPRINT_FILE, UNEVEN_FILE):
        (folder / file).unlink(missing_ok=True)
    parts: dict[str, list[tuple[str, int, str]]] = {split: [] for split in PER_CLASS}
    for label, name in enumerate(class_names()):
        (folder / "images" / name).mkdir(parents=True, exist_ok=True)
        for split, count in PER_CLASS.items():
            for number in range(count):
                path = f"{name}/{split}-{number:03d}.png"
                colour, shape = name.split("_")
                key = hashlib.sha256(f"{seed} {path}".encode()).digest()
                picture = coloured_shape(np.random.default_rng(list(key)), colour, shape)
                picture.save(folder / "images" / path)
                parts[split].append((path, label, name))
    with replacing(folder / SPLIT_FILE) as temporary:
        temporary.write_text(json.dumps(parts) + "\n")
    with replacing(folder / FINGERPRINT_FILE) as temporary:
        temporary.write_text(json.dumps(made_from) + "\n")
    _write_uneven(folder, seed)
    return folder


def _write_uneven(folder: Path, seed: int) -> None:
    """Write the split file of an uneven pool, where it is missing: frequent and rare classes, in a random order.

    The numbers of training images fall geometrically from all to `UNEVEN_FEWEST`; validation and test stay even.
    """
    target = folder / UNEVEN_FILE
    if target.is_file():
        return
    parts = json.loads((folder / SPLIT_FILE).read_text("utf-8"))
    labels = sorted({label for _, label, _ in parts["train"]})
    ranks = np.random.default_rng([seed, len(labels)]).permutation(len(labels))
    most, last = PER_CLASS["train"], max(1, len(labels) - 1)
    kept = {label: round(most * (UNEVEN_FEWEST / most) ** (int(ranks[k]) / last)) for k, label in enumerate(labels)}
    seen: dict[int, int] = {}
    train = []
    for path, label, name in parts["train"]:
        seen[label] = seen.get(label, 0) + 1
        if seen[label] <= kept[label]:
            train.append((path, label, name))
    with replacing(target) as temporary:
        temporary.write_text(json.dumps({**parts, "train": train}) + "\n")


def coloured_shape(rng: np.random.Generator, colour: str, shape: str) -> Image.Image:
    """One image of SIZE x SIZE pixels."""
    side = SIZE * SCALE
    level = int(rng.integers(70, 190))
    canvas = Image.new("RGB", (side, side), (level, level, level))
    ground = ImageDraw.Draw(canvas)
    for _ in range(SPOTS):
        x, y, r = rng.uniform(0, side), rng.uniform(0, side), rng.uniform(0.02, 0.08) * side
        tone = int(np.clip(level + rng.normal(0, 45), 0, 255))
        ground.ellipse((x - r, y - r, x + r, y + r), fill=(tone, tone, tone))
    size = rng.uniform(0.3, 0.45) * side
    x, y = rng.uniform(0.55 * size, side - 0.55 * size, size=2)
    mask = Image.new("L", (side, side), 0)
    _draw_shape(ImageDraw.Draw(mask), shape, float(x), float(y), float(size), float(rng.uniform(-0.5, 0.5)))
    share = 1 - rng.uniform(*FADED)
    ink = np.clip(np.array(COLOURS[colour]) + rng.integers(-25, 26, size=3), 0, 255)
    faded = tuple(int(share * v + (1 - share) * level) for v in ink)
    canvas.paste(Image.new("RGB", (side, side), faded), (0, 0), mask)
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)
    return Image.fromarray(np.clip(pixels + rng.normal(0, NOISE, pixels.shape), 0, 255).astype(np.uint8))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, size: float, turn: float) -> None:
    half = size / 2
    if shape in ("circle", "ring"):
        box = (x - half, y - half, x + half, y + half)
        if shape == "circle":
            pen.ellipse(box, fill=255)
        else:
            pen.ellipse(box, outline=255, width=round(0.2 * size))
        return
    arm = 0.2 * size
    corners = {
        "square": [[(-half, -half), (half, -half), (half, half), (-half, half)]],
        "triangle": [[(0, -half), (half, half), (-half, half)]],
        "cross": [
            [(-arm / 2, -half), (arm / 2, -half), (arm / 2, half), (-arm / 2, half)],
            [(-half, -arm / 2), (half, -arm / 2), (half, arm / 2), (-half, arm / 2)],
        ],
    }[shape]
    cos, sin = math.cos(turn), math.sin(turn)
    for polygon in corners:
        pen.polygon([(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in polygon], fill=255)
