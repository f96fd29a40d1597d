"""The figure of active prompt learning: accuracy over the labels paid, by dataset and row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.look import COLOURS, DASHES, FAINT, MARKERS, STYLE


def curves_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per dataset; bands are the deviation over seeds, grey lines rows without rounds (`lines` of
    results.json)."""
    datasets = list(dict.fromkeys(line["dataset"] for line in lines if line["groups"]))
    columns = min(3, len(datasets))
    rows = -(-len(datasets) // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6 * columns + 0.4, 3.2 * rows + 0.5), layout="constrained")
        panels = [axes for row in figure.subplots(rows, columns, squeeze=False) for axes in row]
        for axes, dataset in zip(panels, datasets, strict=False):
            _panel(axes, [line for line in lines if line["dataset"] == dataset])
            axes.set_title(dataset)
            axes.set_xlabel("labels paid")
            axes.set_ylabel("accuracy (percent)")
        for axes in panels[len(datasets) :]:
            axes.remove()
        panels[0].legend(fontsize=8, frameon=False)
    return figure


def _panel(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    for number, line in enumerate(line for line in lines if line.get("area")):
        spreads, paid = list(line["groups"].values()), line["paid"]
        means, colour = [spread["mean"] for spread in spreads], COLOURS[number % len(COLOURS)]
        turn = number // len(COLOURS)  # more rows than colours differ in dash and marker
        axes.plot(
            paid,
            means,
            color=colour,
            linestyle=DASHES[(number + turn) % len(DASHES)],
            marker=MARKERS[(number + turn) % len(MARKERS)],
            markersize=4,
            linewidth=1.4,
            label=line["method"],
        )
        deviations = [spread["deviation"] or 0.0 for spread in spreads]
        low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        axes.fill_between(paid, low, high, color=colour, alpha=0.12, linewidth=0)
    for line in lines:
        if not line.get("area"):
            mean = next(iter(line["groups"].values()))["mean"]
            axes.axhline(mean, color=FAINT, linewidth=1)
            axes.annotate(
                line["method"], (1, mean), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=8
            )
