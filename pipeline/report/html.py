"""Renders a report's template and writes the page atomically into the run folder; used by both kinds of report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.files.atomic import replacing
from pipeline.runs.layout import REPORT

TEMPLATES = Path(__file__).with_name("templates")


def write_page(run: Path, template: str, filters: Mapping[str, Callable[..., str]], content: Mapping[str, Any]) -> Path:
    """Write report.html into the run's folder and return its path.

    Args:
        run: The run's folder.
        template: Name of a file in `templates/`.
        filters: The template's filters by name.
        content: The template's variables by name; jinja2 raises UndefinedError for a missing one.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    html = environment.get_template(template).render(content)
    page = run / REPORT
    with replacing(page) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return page
