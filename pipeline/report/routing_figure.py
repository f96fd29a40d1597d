"""Figures of routing: which sets rank first and which are inserted, for a few tasks and for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.report.figures import heatmap
from pipeline.report.look import EMPTY, INK, STYLE, cell_colours

Shares = Mapping[str, Mapping[str, float]]  # true task -> set -> percent

FEW = 14  # sets up to which all tables stand side by side, with a number in every cell
MOST = 48  # sets of a figure; a cell of more would have no room for its number
CELL = (0.27, 0.2)  # inches of a cell of a figure with many sets
SMALL = 6.5  # points of its numbers


def routing_figures(tables: Mapping[str, Shares], tasks: Sequence[str]) -> list[Figure]:
    """Draw tables (title -> true task -> set -> percent) as heatmaps: one figure of a few tasks, one a table of many.

    Of more than `MOST` sets those are drawn that take or lose the largest shares of samples in the first table.
    """
    sets = list(tasks)
    for table in tables.values():
        sets += [name for row in table.values() for name in row if name not in sets]
    true = [task for task in tasks if any(task in table for table in tables.values())]
    with rc_context(STYLE):
        if len(sets) <= FEW:
            return [_side_by_side(tables, true, sets)]
        shown = set(confused_sets(next(iter(tables.values())), sets))
        true, sets = [task for task in true if task in shown], [name for name in sets if name in shown]
        return [_dense(title, table, true, sets) for title, table in tables.items()]


def confused_sets(table: Shares, sets: Sequence[str], most: int = MOST) -> list[str]:
    """The sets that take or lose the largest shares of samples, in their own order; all where there are few."""
    moved = dict.fromkeys(sets, 0.0)
    for task, row in table.items():
        for name, share in row.items():
            if name != task:
                moved[task] = moved.get(task, 0.0) + share
                moved[name] = moved.get(name, 0.0) + share
    largest = set(sorted(sets, key=lambda name: -moved[name])[:most])
    return [name for name in sets if name in largest]


def _side_by_side(tables: Mapping[str, Shares], true: Sequence[str], sets: Sequence[str]) -> Figure:
    width, height = 1.4 + 0.9 * len(sets), 1.5 + 0.45 * len(true)
    figure = Figure(figsize=(width * len(tables), height), layout="constrained")
    for place, (title, table) in enumerate(tables.items(), start=1):
        axes = figure.add_subplot(1, len(tables), place)
        heatmap(axes, [[table.get(task, {}).get(name, 0.0) for name in sets] for task in true], true, sets, ".0f")
        axes.set_xlabel(title)
        if place == 1:
            axes.set_ylabel("true task")
    return figure


def _dense(title: str, table: Shares, true: Sequence[str], sets: Sequence[str]) -> Figure:
    """A heatmap of small cells, of which only those with a share have a colour and, from half a percent, a number."""
    size = (2.2 + CELL[0] * len(sets), 1.9 + CELL[1] * len(true))
    figure = Figure(figsize=size, layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.set_facecolor(EMPTY)
    for line, task in enumerate(true):
        for column, name in enumerate(sets):
            share = table.get(task, {}).get(name, 0.0)
            if share <= 0:
                continue
            background, ink = cell_colours(share)
            axes.add_patch(Rectangle((column - 0.5, line - 0.5), 1, 1, facecolor=background, edgecolor="white", lw=0.8))
            if share >= 0.5:
                axes.text(column, line, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=SMALL)
    axes.set_xlim(-0.5, len(sets) - 0.5)
    axes.set_ylim(len(true) - 0.5, -0.5)
    axes.set_xticks(range(len(sets)), sets, rotation=90, fontsize=8)
    axes.set_yticks(range(len(true)), true, fontsize=8)
    axes.tick_params(length=0)
    # Lines between every fifth row and column lead from a cell to its names.
    axes.set_xticks([place - 0.5 for place in range(5, len(sets), 5)], minor=True)
    axes.set_yticks([place - 0.5 for place in range(5, len(true), 5)], minor=True)
    axes.grid(which="minor", color=INK, linewidth=0.3, alpha=0.35)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel(title)
    axes.set_ylabel("true task")
    return figure
