"""Contact sheets: pictures with their numbers, to be looked at beside a table with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLUMNS, ROWS = 5, 6  # pictures on a sheet
SIDE = 240  # pixels of a picture's place
LINE = 34  # pixels of the line with its number
GAP = 8
PAPER, INK = (255, 255, 255), (31, 41, 51)


def draw_sheets(pictures: Sequence[Path], folder: Path) -> list[Path]:
    """Draw the pictures, numbered from 1, into `folder`/sheet-01.jpg and so on; returns the sheets' paths."""
    sheets: list[Path] = []
    most = COLUMNS * ROWS
    font = ImageFont.load_default(22)
    for start in range(0, len(pictures), most):
        part = pictures[start : start + most]
        columns, rows = min(COLUMNS, len(part)), -(-len(part) // COLUMNS)
        width, height = (columns * (SIDE + GAP) + GAP, rows * (SIDE + LINE + GAP) + GAP)
        sheet = Image.new("RGB", (width, height), PAPER)
        pen = ImageDraw.Draw(sheet)
        for place, path in enumerate(part):
            left = GAP + place % COLUMNS * (SIDE + GAP)
            top = GAP + place // COLUMNS * (SIDE + LINE + GAP)
            pen.text((left + SIDE / 2, top + LINE / 2), str(start + place + 1), INK, font, anchor="mm")
            with Image.open(path) as picture:
                small = picture.convert("RGB")
            # Enlarged too, because a picture of few pixels could not be recognised beside its number.
            share = SIDE / max(small.size)
            small = small.resize([max(1, round(length * share)) for length in small.size])
            sheet.paste(small, (left + (SIDE - small.width) // 2, top + LINE + (SIDE - small.height) // 2))
        target = folder / f"sheet-{len(sheets) + 1:02d}.jpg"
        sheet.save(target, quality=90)
        sheets.append(target)
    return sheets
