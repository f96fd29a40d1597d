"""Colours of pages: figures take the page's, and text stands out from every cell, on white and in the dark."""

from __future__ import annotations

import re

from pipeline.report.figures import loss_figure, matrix_figure
from pipeline.report.html import TEMPLATES
from pipeline.report.look import (
    CELLS_OF_PAGES,
    DARK_PAGE,
    PAGE_COLOURS,
    cell_style,
    inline_svg,
    mixed_cell,
    page_colour,
)

READABLE = 4.5  # WCAG AA


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted(map(luminance, (first, second)))
    return (high + 0.05) / (low + 0.05)


def scheme(dark: bool) -> dict[str, str]:
    """The colours of base.html.j2 by name."""
    text = (TEMPLATES / "base.html.j2").read_text("utf-8")
    light, _, rest = text.partition("prefers-color-scheme: dark")
    found = dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", rest if dark else light))
    return found | ({"--ink": str(CELLS_OF_PAGES["dark_ink"])} if dark else {})  # the template takes it from there


def test_both_colour_schemes_have_the_same_names_and_readable_text() -> None:
    light, dark = scheme(dark=False), scheme(dark=True)
    assert set(light) == set(dark) >= set(PAGE_COLOURS.values())
    for colours in (light, dark):
        for name in ("--ink", "--faint", "--link", "--right", "--wrong"):
            for ground in ("--paper", "--empty"):
                assert contrast(colours[name], colours[ground]) >= READABLE, (name, ground)


def test_numbers_stand_out_from_every_cell_in_the_dark() -> None:
    low, high = DARK_PAGE
    for percent in range(101):
        mixed = [round(a + (b - a) * percent / 100) for a, b in zip(low, high, strict=True)]
        ground = "#" + "".join(f"{part:02x}" for part in mixed)
        assert contrast(str(CELLS_OF_PAGES["dark_ink"]), ground) >= READABLE, percent


def test_a_figure_in_a_page_has_no_colour_of_the_white_page_left() -> None:
    matrix = {"tasks": ["a", "b"], "accuracy": [[10.0, None], [37.4, 100.0]], "zero_shot": [0.0, 1.0]}
    svg = inline_svg(matrix_figure(matrix), "m", "text")
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
    assert not used & {*PAGE_COLOURS, "#000000"}
    assert f"fill: {mixed_cell(37)}" in svg and f"fill: {mixed_cell(100)}" in svg
    assert page_colour("#0072b2") == "#0072b2"  # lines keep their colours


def test_a_cell_of_a_table_and_of_a_figure_have_the_same_colour() -> None:
    assert mixed_cell(37) in cell_style(37.4)
    assert "var(--empty)" in cell_style(None)
    assert mixed_cell(100) in cell_style(143.0)  # CIDEr passes 100


def test_losses_are_drawn_on_a_logarithmic_axis_and_zeros_left_out() -> None:
    curves = {"01-a": [{"step": 1, "loss": 10.0, "loss_lm": 0.0}, {"step": 2, "loss": 0.1, "loss_lm": 0.0}]}
    (axes,) = loss_figure(curves).axes
    assert axes.get_yscale() == "log"
    assert [line.get_label() for line in axes.get_lines()] == ["total"]
