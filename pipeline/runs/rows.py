"""The rows of a run's scores, in the order in which the terminal, the report and MLflow show them."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.metrics.continual import retention_per_task
from pipeline.runs.folder import RunFolder, Scores

REFERENCE, STAGE, LAST = "reference", "stage", "last"


@dataclass(frozen=True)
class ScoreRow:
    """A labelled row [T] of scores in percent; `kind`: of nothing learned, after a stage, or again of the last one."""

    label: str
    scores: Scores
    kind: str
    task: str = ""  # of the stage


def score_rows(run: RunFolder) -> list[ScoreRow]:
    """The rows that have a score: majority answer, zero-shot, one per stage, and the last one told and format-free."""
    rows = [
        _row("majority answer", run.majority, REFERENCE),
        _row("zero-shot", run.zero_shot, REFERENCE),
        _row("zero-shot, format-free", run.format_free.get("zero_shot"), REFERENCE),
        *(_row(f"after {task}", row, STAGE, task) for task, row in zip(run.tasks, run.accuracy, strict=True)),
        _row("the same, task told", run.told_scores, LAST),
        _row("the same, format-free", None if run.last_stage is None else run.format_free_scores, LAST),
    ]
    return [row for row in rows if any(score is not None for score in row.scores)]


def matrix_rows(run: RunFolder) -> list[ScoreRow]:
    """The rows of an accuracy matrix in pages: `score_rows`, and from the second stage on what is retained."""
    rows = score_rows(run)
    if run.last_stage:
        seen = run.last_stage + 1
        kept = retention_per_task([row[:seen] for row in run.accuracy[:seen]])
        rows.append(ScoreRow("retention", [*kept, *[None] * (len(run.tasks) - seen)], LAST))
    return rows


def _row(label: str, scores: Scores | None, kind: str, task: str = "") -> ScoreRow:
    return ScoreRow(label, scores or [], kind, task)
