"""Figures of runs: accuracy matrix, mean score by stage, forgetting, similarities and losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from pipeline.report.look import (
    COLOURS,
    DASHES,
    FAINT,
    GRID,
    INK,
    MARKERS,
    STYLE,
    Scores,
    cell_colours,
    save,
)

LOSS_TERMS = {"loss": "total", "loss_lm": "language", "loss_image": "image key", "loss_text": "text key"}
LEGEND: dict[str, Any] = {"loc": "outside upper left", "frameon": False, "fontsize": 9}  # left: a phone shows it first


def matrix_figure(matrix: Mapping[str, Any], path: Path | None = None) -> Figure:
    """Draw an accuracy matrix (content of matrix.json) as a heatmap with numbers; also saves it when given a path."""
    tasks = [str(task) for task in matrix["tasks"]]
    rows: list[tuple[str, Scores]] = [
        (f"after {task}", row) for task, row in zip(tasks, matrix.get("accuracy") or [], strict=False)
    ]
    rows = [(label, row) for label, row in rows if any(score is not None for score in row)]
    references = [("majority answer", matrix.get("majority")), ("zero-shot", matrix.get("zero_shot"))]
    above: list[tuple[str, Scores]] = [(label, scores) for label, scores in references if scores]
    with rc_context(STYLE):
        figure = Figure(figsize=(1.9 + 0.95 * len(tasks), 1.5 + 0.48 * max(len(above + rows), 1)), layout="constrained")
        axes = figure.add_subplot()
        heatmap(axes, [row for _, row in above + rows], [label for label, _ in above + rows], tasks)
        axes.set_xlabel("score on (percent)")
        if above and rows:
            axes.axhline(len(above) - 0.5, color="white", linewidth=6)  # separates what learned nothing from the stages
    if path is not None:
        save(figure, path)
    return figure


def loss_figure(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draw the loss terms over the steps, one panel per stage, all with the same axes.

    The losses' axis is logarithmic, because the first ones are many times the last; a term that is 0 has no point.
    """
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * columns + 0.4, 2.2 * lines + 0.5), layout="constrained")
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        panels = [axes for row in grid for axes in row]
        for axes, (stage, log) in zip(panels, curves.items(), strict=False):
            for (term, label), colour, dash in zip(LOSS_TERMS.items(), COLOURS, DASHES, strict=False):
                points = [(line["step"], line[term]) for line in log if (line.get(term) or 0.0) > 0.0]
                if points:
                    steps, values = zip(*points, strict=True)
                    marker = "o" if len(points) == 1 else None
                    axes.plot(steps, values, color=colour, linestyle=dash, linewidth=1.4, marker=marker, label=label)
            axes.set_title(stage, fontsize=10, loc="left")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.grid(axis="y", color=GRID, linewidth=0.6)
        for axes in panels[len(curves) :]:
            axes.set_visible(False)
        for axes in grid[:, 0]:
            axes.set_ylabel("loss (log scale)")
        for axes in panels[max(0, len(curves) - columns) : len(curves)]:
            axes.set_xlabel("step")
            axes.tick_params(labelbottom=True)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, ncols=4, **LEGEND)
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
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        figure.legend(ncols=3, **LEGEND)
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
            axes.grid(axis="y", color=GRID, linewidth=0.6)
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
            figure.legend(list(found.values()), list(found), ncols=3, **LEGEND)
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
                whiskerprops={"color": INK},
                capprops={"color": INK},
                boxprops={"facecolor": COLOURS[number] + "55", "edgecolor": INK, "hatch": ("", "////")[number % 2]},
                label=label,
            )
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set_ylabel("true task")
        axes.set_xlabel("similarity")
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(ncols=2, **LEGEND)
    return figure


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
