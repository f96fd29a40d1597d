"""Figures of runs: accuracy matrix, mean score by stage, forgetting, similarities and losses; others use their style.

Colour is never the only cue: cells show their numbers, lines differ in dash and marker.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Scores = Sequence[float | None]

# Okabe and Ito's palette, safe for the common kinds of colour blindness; black and yellow left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
MARKERS = "osD^vP"
INK, FAINT, EMPTY = "#1f2933", "#9aa5b1", "#f5f7fa"
# Cells range from nearly white to a blue on which dark text has the contrast required by WCAG AA.
LIGHT_CELL, DARK_CELL = (239, 246, 252), (84, 158, 214)
PNG_DPI = 160
SMALLEST_SVG = 560  # pixels of width
SMALLEST_SHARE = 0.7  # of its natural width, below which a wide figure is unreadable
LOSS_TERMS = {"loss": "total", "loss_lm": "language", "loss_image": "image key", "loss_text": "text key"}
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names may contain dollar signs
    "svg.fonttype": "none",  # text as text, so that it can be searched and read by screen readers
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def matrix_figure(matrix: Mapping[str, Any], path: Path | None = None) -> Figure:
    """Draw an accuracy matrix (content of matrix.json) as a heatmap with numbers; also saves it when given a path."""
    tasks = [str(task) for task in matrix["tasks"]]
    rows: list[tuple[str, Scores]] = [
        (f"after {task}", row) for task, row in zip(tasks, matrix.get("accuracy") or [], strict=False)
    ]
    rows = [(label, row) for label, row in rows if any(score is not None for score in row)]
    if matrix.get("zero_shot"):
        rows.insert(0, ("zero-shot", matrix["zero_shot"]))
    with rc_context(STYLE):
        figure = Figure(figsize=(1.9 + 0.95 * len(tasks), 1.5 + 0.48 * max(len(rows), 1)), layout="constrained")
        axes = figure.add_subplot()
        heatmap(axes, [row for _, row in rows], [label for label, _ in rows], tasks)
        axes.set_xlabel("score on (percent)")
        if matrix.get("zero_shot") and len(rows) > 1:
            axes.axhline(0.5, color="white", linewidth=6)  # separates the frozen model from the stages
    if path is not None:
        save(figure, path)
    return figure


def loss_figure(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw the loss terms over the steps, one panel per stage, all with the same axes."""
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * columns + 0.4, 2.2 * lines + 0.5), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        panels = [axes for row in grid for axes in row]
        for axes, (stage, log) in zip(panels, curves.items(), strict=False):
            for (term, label), colour, dash in zip(LOSS_TERMS.items(), COLOURS, DASHES, strict=False):
                points = [(line["step"], line[term]) for line in log if isinstance(line.get(term), int | float)]
                if points:
                    steps, values = zip(*points, strict=True)
                    marker = "o" if len(points) == 1 else None
                    axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.4, marker=marker, label=label)
            axes.set_title(stage, fontsize=10, loc="left")
            axes.grid(axis="y", color="#e4e7eb", linewidth=0.6)
        for axes in panels[len(curves) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("loss")
        for axes in panels[max(0, len(curves) - columns) : len(curves)]:
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    return figure


def course_figure(courses: Mapping[str, Scores], tasks: Sequence[str]) -> Figure:
    """Draw the mean score over the tasks seen so far after each stage, one line per run."""
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for place, (name, means) in enumerate(courses.items()):
            points = [(stage, mean) for stage, mean in enumerate(means) if mean is not None]
            if points:
                stages, values = zip(*points, strict=True)
                style = place % len(COLOURS)
                axes.plot(
                    stages, values, color=COLOURS[style], linestyle=DASHES[style], marker=MARKERS[style], label=name
                )
        labels = [f"{number}. {task}" for number, task in enumerate(tasks, start=1)]
        axes.set_xticks(range(len(tasks)), labels)
        axes.tick_params(axis="x", labelrotation=_rotation(labels, 12))
        axes.set_xlim(-0.3, len(tasks) - 0.7)
        axes.set_ylim(0, 102)
        axes.set_ylabel("mean over tasks seen (percent)")
        axes.set_xlabel("after stage")
        axes.grid(axis="y", color="#e4e7eb", linewidth=0.6)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=9)
    return figure


def forgetting_figure(
    courses: Mapping[str, Mapping[str, Scores]], tasks: Sequence[str], baseline: Scores | None = None
) -> Figure:
    """Draw the score on each task after its own and every later stage: one panel per task, one line per run.

    `courses`: run -> task -> scores after each stage [T] in percent; `baseline` [T]: scores of the frozen model.
    """
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.7 * columns + 0.5, 1.9 * lines + 0.9), layout="constrained")
        panels = [
            axes for row in figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False) for axes in row
        ]
        for place, (axes, task) in enumerate(zip(panels, tasks, strict=False)):
            if baseline is not None and baseline[place] is not None:
                axes.axhline(baseline[place], color=FAINT, linewidth=1.2, linestyle=(0, (1, 2)), label="zero-shot")
            for number, (name, scores) in enumerate(courses.items()):
                points = [(t + 1, score) for t, score in enumerate(scores.get(task, ())) if score is not None]
                if points:
                    stages, values = zip(*points, strict=True)
                    style = number % len(COLOURS)
                    axes.plot(
                        stages,
                        values,
                        color=COLOURS[style],
                        linestyle=DASHES[style],
                        marker=MARKERS[style],
                        markersize=4,
                        label=name,
                    )
            axes.set_title(task, fontsize=10, loc="left")
            axes.set_xlim(0.7, len(tasks) + 0.3)
            axes.set_ylim(-4, 104)
            axes.set_xticks(range(1, len(tasks) + 1))
            axes.grid(axis="y", color="#e4e7eb", linewidth=0.6)
        for axes in panels[len(tasks) :]:
            axes.set_visible(False)
        for axes in panels[max(0, len(tasks) - columns) : len(tasks)]:
            axes.tick_params(labelbottom=True)
        figure.supxlabel("after stage", fontsize=10)
        figure.supylabel("score on the task (percent)", fontsize=10)
        found = {
            label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        if found:
            figure.legend(
                list(found.values()), list(found), loc="outside upper left", ncols=3, frameon=False, fontsize=9
            )
    return figure


def similarity_figure(distributions: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Draw box plots of the similarities (true task -> label -> values) of samples to their own set and the best other.

    Boxes cover the middle 50 percent of the samples, whiskers the middle 90; the labels differ in hatching too.
    """
    tasks = list(distributions)
    labels = list(dict.fromkeys(label for table in distributions.values() for label in table))
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.75 * len(tasks) + 1.2), layout="constrained")
        axes = figure.add_subplot()
        for number, label in enumerate(labels):
            places = [place for place, task in enumerate(tasks) if distributions[task].get(label)]
            axes.boxplot(
                [distributions[tasks[place]][label] for place in places],
                positions=[place + 0.36 * (number - (len(labels) - 1) / 2) for place in places],
                widths=0.28,
                whis=(5, 95),
                showfliers=False,
                orientation="horizontal",
                patch_artist=True,
                manage_ticks=False,
                medianprops={"color": INK, "linewidth": 1.6},
                boxprops={"facecolor": COLOURS[number] + "55", "edgecolor": INK, "hatch": ("", "////")[number % 2]},
                label=label,
            )
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set_ylabel("true task")
        axes.set_xlabel("similarity")
        axes.grid(axis="x", color="#e4e7eb", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, or in the format of the path's suffix; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure.savefig(path, dpi=PNG_DPI, facecolor="white")
    return path


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an <svg> element for HTML.

    `name` is unique on the page and prefixes every id in it; `description` is the text for screen readers.
    """
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": name}):  # a fixed salt makes the ids, and so the report, reproducible
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', svg)
    natural = float(width.group(1)) * 4 / 3 if width else 0.0  # pixels
    # With a minimum width a narrow screen scrolls the figure instead of shrinking its text.
    least = min(natural, max(SMALLEST_SVG, SMALLEST_SHARE * natural))
    size = f"max-width:{natural:.0f}px;min-width:{least:.0f}px" if width else ""
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}" style="width:100%;{size}"', 1)


def cell_colours(score: float | None) -> tuple[str, str]:
    """Return (background, ink) of a cell for a score in percent, the same in figures and in HTML tables."""
    if score is None:
        return EMPTY, FAINT
    share = min(max(score / 100.0, 0.0), 1.0)
    mixed = [round(low + (high - low) * share) for low, high in zip(LIGHT_CELL, DARK_CELL, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed), INK


def heatmap(
    axes: Axes, rows: Sequence[Scores], labels: Sequence[str], columns: Sequence[str], digits: str = ".1f"
) -> None:
    """Draw cells with their numbers; None: an empty cell."""
    from matplotlib.patches import Rectangle

    for line, row in enumerate(rows):
        for column, score in enumerate(row):
            background, ink = cell_colours(score)
            axes.add_patch(Rectangle((column - 0.5, line - 0.5), 1, 1, facecolor=background, edgecolor="white", lw=1.5))
            text = "–" if score is None else format(score, digits)
            axes.text(column, line, text, ha="center", va="center", color=ink, fontsize=10)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns)
    axes.tick_params(axis="x", labelrotation=_rotation(columns, 11))
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _rotation(labels: Sequence[str], fitting: int) -> float:
    """Rotation in degrees of labels, of which at most `fitting` characters fit side by side."""
    return 30.0 if max((len(label) for label in labels), default=0) > fitting else 0.0
