"""Scores per task with what they are made of: metric, number of test samples, confidence interval, references."""

from __future__ import annotations

from typing import Any

from pipeline.metrics.intervals import Interval, interval, mean_interval
from pipeline.report.boxes import metric_of
from pipeline.runs.folder import RunFolder

ROUNDING = 0.05  # percent points by which a stored score may differ from the mean of its predictions' points


def points(run: RunFolder, task: str) -> list[float] | None:
    """The points [n] of the answers that a task's last score is the mean of.

    None where they are not in the run folder, and for scores of a whole test set, such as CIDEr.
    """
    score = run.last_scores[run.tasks.index(task)]
    found = [line.get("score") for line in run.last_predictions().get(task, [])]
    known = [point for point in found if point is not None]
    if score is None or not known or len(known) < len(found) or not all(0 <= point <= 1 for point in known):
        return None
    return known if abs(100 * sum(known) / len(known) - score) <= ROUNDING else None


def score_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Per task its metric, number of test samples, scores after its own and the last stage, and their interval."""
    rows = []
    for place, task in enumerate(run.tasks):
        answers = points(run, task)
        rows.append(
            {
                "task": task,
                "metric": metric_of(run, task),
                "samples": None if answers is None else len(answers),
                "majority": run.majority[place] if run.majority else None,
                "zero_shot": run.zero_shot[place] if run.zero_shot else None,
                "own": run.accuracy[place][place],
                "last": run.last_scores[place],
                "interval": None if answers is None else interval(answers),
                "told": run.told_scores[place] if run.told_scores else None,
                "format_free": run.format_free_scores[place] if run.format_free_scores else None,
            }
        )
    return rows


def overall(run: RunFolder) -> tuple[int | None, Interval | None]:
    """(number of test samples, interval of `last`) over the tasks learned so far; None where a task's are unknown."""
    known = [row for row in score_rows(run) if row["last"] is not None]
    samples = [row["samples"] for row in known]
    if not known or None in samples:
        return None, None
    return sum(samples), mean_interval([row["last"] for row in known], [row["interval"] for row in known])
