"""Renders a report's template and writes the page atomically into the run folder; used by all kinds of reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.files.atomic import replacing
from pipeline.report import look, numbers
from pipeline.runs.layout import REPORT

TEMPLATES = Path(__file__).with_name("templates")
FILTERS: Mapping[str, Callable[..., str]] = {
    "percent": numbers.percent,
    "spread": numbers.spread,
    "amount": numbers.amount,
    "limits": numbers.limits,
    "cell": look.cell_style,
}


def write_page(run: Path, template: str, filters: Mapping[str, Callable[..., str]], content: Mapping[str, Any]) -> Path:
    """Write report.html into the run's folder and return its path.

    Args:
        run: The run's folder.
        template: Name of a file in `templates/`, which extends base.html.j2.
        filters: The template's filters by name, beside those of `FILTERS`.
        content: The template's variables by name, with `contents`, the headings as (id, title); jinja2 raises
            UndefinedError for a missing one.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {**FILTERS, **filters}
    html = environment.get_template(template).render({**content, "cells": look.CELLS_OF_PAGES})
    page = run / REPORT
    with replacing(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page
