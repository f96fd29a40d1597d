"""A comparison as one page, a plot of accuracy against stored parameters, and tables for other programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.files.atomic import write_if_other
from pipeline.report.compared import (
    COLUMNS,
    LAST,
    STORED,
    ComparedMethod,
    headline,
    markdown,
    rows,
    task_rows,
    whole,
)
from pipeline.report.html import write_page
from pipeline.report.look import COLOURS, GRID, MARKERS, STYLE, cell_style, inline_svg, save
from pipeline.report.numbers import percent

JSON, MARKDOWN, CSV, FIGURE = "comparison.json", "comparison.md", "comparison.csv", "accuracy_by_stored.png"


def write_comparison(
    folder: Path, name: str, methods: Sequence[ComparedMethod], facts: Mapping[str, str], missing: Sequence[str] = ()
) -> Path:
    """Write the page, the tables and the figure of a comparison into its folder; returns the page's path.

    Args:
        folder: where; made if it is not there.
        name: the recipe's.
        methods: methods with at least one finished run.
        facts: what holds for all of them, for the head of the page.
        missing: runs that are not finished, with the reason.
    """
    from markupsafe import Markup

    folder.mkdir(parents=True, exist_ok=True)
    figure = stored_figure(methods)
    save(figure, folder / "figures" / FIGURE)
    seeds = sorted({seed for method in methods for seed in method.seeds})
    write_if_other(
        folder / JSON, json.dumps({**whole(methods), "missing": list(missing)}, indent=2, ensure_ascii=False) + "\n"
    )
    write_if_other(folder / MARKDOWN, markdown(methods, ", ".join(seeds), missing))
    write_if_other(folder / CSV, _csv(methods))
    content = {
        "name": name,
        "contents": [
            ("top", "Summary"),
            ("h-methods", "Methods"),
            ("h-stored", "Accuracy by parameters"),
            ("h-tasks", "Scores per task"),
        ],
        "facts": list(facts.items()),
        "columns": COLUMNS,
        "rows": rows(methods),
        "tasks": headline(methods)["tasks"],
        "scores": task_rows(methods),
        "missing": list(missing),
        "figure": Markup(inline_svg(figure, "figure-stored", "Accuracy against stored parameters per task")),
    }
    return write_page(folder, "comparison.html.j2", {"percent": percent, "cell": cell_style}, content)


def stored_figure(methods: Sequence[ComparedMethod]) -> Figure:
    """Draw each method's last score, and its deviation, against the parameters that it stores per task."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.add_subplot()
        stored = {method.label: method.spread(STORED) for method in methods}
        drawn = 0
        for place, method in enumerate(methods):
            size, last = stored[method.label], method.spread(LAST)
            if size is None or last is None:
                continue
            look: Any = {
                "color": COLOURS[place % len(COLOURS)],
                "marker": MARKERS[place // len(COLOURS) % len(MARKERS)],
            }
            axes.errorbar(
                [size[0]], [last[0]], yerr=[last[1] or 0.0], linestyle="", capsize=3, label=method.label, **look
            )
            drawn += 1
        # Methods that store nothing stand at zero, which a plain logarithm has no place for.
        axes.set_xscale("symlog", linthresh=100)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}"))
        axes.set_xlim(left=-10)
        axes.set_ylim(0, 102)
        axes.set_xlabel("parameters stored per task")
        axes.set_ylabel("last (percent)")
        axes.grid(color=GRID, linewidth=0.6)
        if drawn:
            figure.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=9)
    return figure


def _csv(methods: Sequence[ComparedMethod]) -> str:
    """One line per method: every column's mean and deviation, then its scores per task."""
    tasks = headline(methods)["tasks"]
    head = [name for column in COLUMNS for name in (column.title, f"{column.title} deviation")]
    head += [f"{kind}.{task}" for kind in ("told", "routed", "format-free") for task in tasks]
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow(["method", "seeds", "changes earlier", "needs the task", *head])
    for method in methods:
        numbers: list[Any] = [part for column in COLUMNS for part in (method.spread(column) or (None, None))]
        for found in (method.told(), method.routed(), method.row(lambda run: run.format_free_scores)):
            numbers += found or [None] * len(tasks)
        shown = ["" if number is None else f"{number:.10g}" for number in numbers]
        table.writerow([method.label, " ".join(method.seeds), method.changes_earlier, method.needs_task, *shown])
    return file.getvalue()
