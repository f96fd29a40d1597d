"""The rows of a run's scores, in the order in which the terminal, the report and MLflow show them."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.runs.folder import RunFolder, Scores

REFERENCE, STAGE, LAST = "reference", "stage", "last"


@dataclass(frozen=True)
class ScoreRow:
    """A labelled row [T] of scores in percent; `kind`: of nothing learned, after a stage, or again of the last one."""

    label: str
    scores: Scores
    kind: str


def score_rows(run: RunFolder) -> list[ScoreRow]:
    """The rows that have a score: majority answer, zero-shot, one per stage, and the last one told and format-free."""
    rows: list[tuple[str, Scores | None, str]] = [
        ("majority answer", run.majority, REFERENCE),
        ("zero-shot", run.zero_shot, REFERENCE),
        ("zero-shot, format-free", run.format_free.get("zero_shot"), REFERENCE),
    ]
    rows += [(f"after {task}", row, STAGE) for task, row in zip(run.tasks, run.accuracy, strict=True)]
    rows.append(("the same, task told", run.told_scores, LAST))
    if run.last_stage is not None:
        rows.append(("the same, format-free", run.format_free_scores, LAST))
    return [ScoreRow(label, scores, kind) for label, scores, kind in rows if scores and _any(scores)]


def _any(scores: Scores) -> bool:
    return any(score is not None for score in scores)
