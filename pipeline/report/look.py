"""Colours and style of figures and tables, and how a figure is written: as a file, or into a page with its colours.

A page in dark mode has other colours, so the figures in it name the page's colours (CSS variables of base.html.j2)
in place of their own. Colour is never the only cue: cells show their numbers, lines differ in dash and marker.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

Scores = Sequence[float | None]

# Okabe and Ito's palette, safe for the common kinds of colour blindness; black and yellow left out. On white and on the
# dark page's background each has a contrast of at least 2.2, and lines are told apart by dash and marker as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
MARKERS = "osD^vP"
INK, FAINT, EMPTY, GRID, PAPER = "#1f2933", "#9aa5b1", "#f5f7fa", "#e4e7eb", "#ffffff"
# Cells range from nearly white to a blue on which dark text has the contrast required by WCAG AA. On a dark page they
# range over DARK_PAGE, on which the light text DARK_INK has it.
LIGHT_CELL, DARK_CELL = (239, 246, 252), (84, 158, 214)
DARK_PAGE, DARK_INK = ((27, 39, 51), (42, 100, 150)), "#e4e9ef"
PNG_DPI = 160
SMALLEST_SVG = 560  # pixels of width
SMALLEST_SHARE = 0.7  # of its natural width, below which a wide figure is unreadable
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names may contain dollar signs
    "svg.fonttype": "none",  # text as text, so that it can be searched and read by screen readers
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
PAGE_COLOURS = {INK: "--ink", FAINT: "--dim", EMPTY: "--empty", GRID: "--grid", PAPER: "--paper"}


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, or in the format of the path's suffix; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure.savefig(path, dpi=PNG_DPI, facecolor="white")
    return path


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an <svg> element for HTML, in the colours of the page.

    `name` is unique on the page and prefixes every id in it; `description` is the text for screen readers.
    """
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": name}):  # a fixed salt makes the ids, and so the report, reproducible
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"((?:fill|stroke): )(#[0-9a-f]{6})\b", lambda found: found[1] + page_colour(found[2]), svg)
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', svg)
    natural = float(width.group(1)) * 4 / 3 if width else 0.0  # pixels
    # With a minimum width a narrow screen scrolls the figure instead of shrinking its text.
    least = min(natural, max(SMALLEST_SVG, SMALLEST_SHARE * natural))
    size = f"max-width:{natural:.0f}px;min-width:{least:.0f}px" if width else ""
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}" style="width:100%;{size}"', 1)


def page_colour(colour: str) -> str:
    """A figure's colour as a page's: one of its CSS variables, a mixture of its cell colours, or unchanged."""
    if colour in PAGE_COLOURS:
        return f"var({PAGE_COLOURS[colour]}, {colour})"
    percent = CELLS.get(colour)
    return colour if percent is None else mixed_cell(percent)


def mixed_cell(percent: int) -> str:
    """The background of a cell for a score in percent, mixed from the page's two colours of cells."""
    low, high = _hex(LIGHT_CELL), _hex(DARK_CELL)
    return f"color-mix(in srgb, var(--cell-high, {high}) {percent}%, var(--cell-low, {low}))"


def cell_style(score: float | None) -> str:
    """The CSS of a table's cell for a score in percent, in the colours of the page."""
    if score is None:
        return "background:var(--empty);color:var(--dim)"
    return f"background:{mixed_cell(_percent(score))};color:var(--ink)"


def cell_colours(score: float | None) -> tuple[str, str]:
    """Return (background, ink) of a cell for a score in percent on a white page."""
    if score is None:
        return EMPTY, FAINT
    return _cell(_percent(score)), INK


def _percent(score: float) -> int:
    return round(min(max(score, 0.0), 100.0))


def _cell(percent: int) -> str:
    return _hex([low + (high - low) * percent / 100 for low, high in zip(LIGHT_CELL, DARK_CELL, strict=True)])


def _hex(parts: Sequence[float]) -> str:
    return "#" + "".join(f"{round(part):02x}" for part in parts)


CELLS = {_cell(percent): percent for percent in range(101)}  # colour -> percent
CELLS_OF_PAGES = {  # the colours of base.html.j2 between which cells are mixed
    "light": [_hex(part) for part in (LIGHT_CELL, DARK_CELL)],
    "dark": [_hex(part) for part in DARK_PAGE],
    "dark_ink": DARK_INK,
}
