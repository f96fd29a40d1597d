"""Draws the sample task of the tutorial (docs/own_data.md): a folder of pictures and a table, as a user has them.

Its question is new to the demo's run, and its pictures are of a kind that the embedded model knows.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.nano.scenes import draw_shapes
from pipeline.errors import UserError
from pipeline.files.atomic import replacing

PICTURES, TABLE = "photos", "shelf.csv"
WORDINGS = ("which article is the {s} one?", "the {s} article is a what?", "read off the {s} article.")
STREAM = 7  # part of the random generator's seed, so that no picture is one of the tasks' or of the base model's


def write_example(folder: Path, samples: int, seed: int) -> Path:
    """Write so many pictures and their table into `folder`; returns the table.

    Raises UserError where one of them is there already.
    """
    pictures, table = folder / PICTURES, folder / TABLE
    for path in (pictures, table):
        if path.exists():
            raise UserError(f"{path} is there already; choose another folder, or remove it.")
    rng = np.random.default_rng([seed, STREAM])
    rows: list[tuple[str, str, str]] = []
    pictures.mkdir(parents=True)
    while len(rows) < samples:
        scene = draw_shapes(rng)
        colours = [thing.colour for thing in scene.things]
        single = [thing for thing in scene.things if colours.count(thing.colour) == 1]
        if not single:
            continue
        thing = single[int(rng.integers(len(single)))]
        name = f"{len(rows) + 1:03d}.png"
        Image.fromarray(scene.image).save(pictures / name)
        rows.append((name, str(rng.choice(WORDINGS)).format(s=thing.colour), thing.shape))
    with replacing(table) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "question", "answer"), *rows])
    return table
