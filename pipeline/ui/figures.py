"""Figures of runs as SVG files, drawn with those of the report and kept until a run's numbers change."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from pipeline.report.figures import STYLE, course_figure, forgetting_figure, loss_figure
from pipeline.runs.folder import RunFolder
from pipeline.runs.layout import MATRIX, METRICS, STAGES, STATE

KEPT = 64


def course(runs: Sequence[RunFolder]) -> Figure | None:
    """The mean score over the tasks seen after each stage, a line per run; None where there is nothing to draw."""
    courses = {run.name: run.seen_means() for run in runs if any(mean is not None for mean in run.seen_means())}
    return course_figure(courses, runs[0].tasks) if courses and len(runs[0].tasks) > 1 else None


def forgetting(runs: Sequence[RunFolder]) -> Figure | None:
    """The score on each task after its own and every later stage."""
    if course(runs) is None:
        return None
    columns = {
        run.name: {task: [row[place] for row in run.accuracy] for place, task in enumerate(run.tasks)} for run in runs
    }
    return forgetting_figure(columns, runs[0].tasks, runs[0].zero_shot)


def losses(runs: Sequence[RunFolder]) -> Figure | None:
    """The loss terms of the first run over the steps of each stage."""
    curves = runs[0].losses()
    return loss_figure(curves) if curves else None


FIGURES: dict[str, tuple[Callable[[Sequence[RunFolder]], Figure | None], str]] = {
    "course": (course, "Mean score over the tasks seen after each stage"),
    "forgetting": (forgetting, "Score on each task after its own and every later stage"),
    "losses": (losses, "Loss terms over the steps of each stage"),
}


class Drawings:
    """Draws figures one at a time, because matplotlib's settings belong to the whole process."""

    def __init__(self) -> None:
        self._kept: OrderedDict[object, str | None] = OrderedDict()
        self._guard = threading.Lock()

    def svg(self, name: str, runs: Sequence[RunFolder]) -> str | None:
        """The figure as an SVG file; None where the runs have nothing to draw yet. KeyError for an unknown name."""
        draw = FIGURES[name][0]
        key = (name, *(_version(run) for run in runs))
        with self._guard:
            if key not in self._kept:
                figure = draw(runs)
                self._kept[key] = None if figure is None else _written(figure)
                while len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            return self._kept[key]


def _written(figure: Figure) -> str:
    buffer = io.StringIO()
    # Letters as shapes: a picture in an <img> is drawn with fonts that the page does not choose.
    with rc_context(STYLE | {"svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _version(run: RunFolder) -> tuple[object, ...]:
    files = [run.path / MATRIX, run.path / STATE, *sorted((run.path / STAGES).glob(f"*/{METRICS}"))]
    return (str(run.path), *(file.stat().st_mtime_ns for file in files if file.is_file()))
