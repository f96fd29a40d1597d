"""A contact sheet of samples with their questions and answers, for a check by eye."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from pipeline.data.pictures import decode_image

COLUMNS = 5
SIDE = 240  # pixels of an image's longer side


def draw_sheet(samples: Sequence[tuple[Path | None, str, str]], target: Path) -> Path:
    """Draw each sample (image, question, answer) into a PNG of COLUMNS per row and return its path."""
    columns = min(COLUMNS, max(1, len(samples)))
    lines = -(-len(samples) // columns)
    figure = Figure(figsize=(2.5 * columns, 3.3 * lines), layout="constrained")
    panels = [axes for row in figure.subplots(max(1, lines), columns, squeeze=False) for axes in row]
    for axes in panels:
        axes.set_axis_off()
    for axes, (path, question, answer) in zip(panels, samples, strict=False):
        if path is None:
            axes.text(0.5, 0.5, "no image", ha="center", va="center", transform=axes.transAxes, color="#616e7c")
        else:
            picture = decode_image(path.read_bytes())
            picture.thumbnail((SIDE, SIDE))
            axes.imshow(picture)
        # Escaped, because matplotlib renders text between two dollar signs as a formula.
        asked = "\n".join(textwrap.wrap(question, 32)[:3] or [""]).replace("$", r"\$")
        answered = "\n".join(textwrap.wrap(answer, 32)[:2]).replace("$", r"\$")
        axes.set_title(f"{asked}\n→ {answered}", fontsize=8, loc="left", wrap=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, facecolor="white")
    return target
