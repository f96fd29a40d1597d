"""What a comparison's runs come to: one row per method, means and deviations over its seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from pipeline.runs.folder import RunFolder, Scores

Spread = tuple[float, float | None]  # mean, and deviation of a sample (n - 1); None for one seed


@dataclass(frozen=True)
class Column:
    """One number of a run: its title, what it is, how it is written, and where it is read."""

    title: str
    text: str
    read: Callable[[RunFolder], float | None]
    digits: int = 1


@dataclass(frozen=True)
class ComparedMethod:
    """A method of a comparison, with the finished runs of its seeds."""

    label: str
    runs: Sequence[RunFolder]

    @property
    def seeds(self) -> list[str]:
        """The seeds of its finished runs."""
        return [str(run.config.get("seed", "?")) for run in self.runs]

    @property
    def changes_earlier(self) -> str:
        """What a stage changes of earlier tasks."""
        return next((run.changes_earlier for run in self.runs if run.changes_earlier), "")

    @property
    def needs_task(self) -> bool:
        """Whether its scores are told ones, because it has to be given the task."""
        return any(bool(run.state.get("needs_task")) for run in self.runs)

    def spread(self, column: Column) -> Spread | None:
        """A column's mean and deviation over the seeds; None where a run lacks the number."""
        return spread([column.read(run) for run in self.runs])

    def row(self, of: Callable[[RunFolder], Scores | None]) -> list[float | None] | None:
        """The mean over the seeds of scores [T]; None where no run has them."""
        rows = [scores for run in self.runs if (scores := of(run)) is not None]
        if not rows or len(rows) < len(self.runs):
            return None
        columns = [[run_scores[task] for run_scores in rows] for task in range(len(rows[0]))]
        return [None if (found := spread(column)) is None else found[0] for column in columns]

    def told(self) -> list[float | None] | None:
        """Per task, the score with the task told."""
        return self.row(told_scores)

    def routed(self) -> list[float | None] | None:
        """Per task, the score without the task told; None for a method that has to be told."""
        return None if self.needs_task else self.row(lambda run: run.last_scores)


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and deviation of numbers; None where one is missing."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return mean(known), stdev(known) if len(known) > 1 else None


def told_scores(run: RunFolder) -> Scores | None:
    """The last scores with the task told; those of a method that does not route, which are the same either way."""
    told = run.told_scores
    routes = run.state.get("routes", bool(run.routing))
    return run.last_scores if told is None and not routes else told


def _mean(scores: Scores | None) -> float | None:
    found = spread(scores) if scores else None
    return None if found is None else found[0]


def _metric(name: str) -> Callable[[RunFolder], float | None]:
    return lambda run: _mean(run.last_scores) if name == "last" else run.metrics().get(name)


def _routed_right(run: RunFolder) -> float | None:
    return _mean(run.routing.get("accuracy"))


def _cost(name: str, scale: float = 1.0) -> Callable[[RunFolder], float | None]:
    def read(run: RunFolder) -> float | None:
        value = run.costs.get(name)
        return None if value is None else value / scale

    return read


COLUMNS = (
    Column("last", "mean score over all tasks at the end", _metric("last")),
    Column("average", "mean over the stages of the mean over the tasks seen", _metric("average")),
    Column("forgetting", "best earlier score minus the last one; positive = forgotten", _metric("forgetting")),
    Column("told", "last with the task of each sample told", lambda run: _mean(told_scores(run))),
    Column("routed right", "samples whose own task ranked first", _routed_right),
    Column("format-free", "last without letter case, punctuation, articles and wrapping words",
           lambda run: _mean(run.format_free_scores)),
    Column("trained", "parameters trained per stage", _cost("trained_per_stage"), 0),
    Column("stored", "parameters stored per task, which answering needs", _cost("stored_per_task"), 0),
    Column("GFLOP train", "billions of operations per sample of a training step", _cost("operations_training", 1e9), 3),
    Column("GFLOP answer", "billions of operations per answer", _cost("operations_answering", 1e9), 3),
    Column("train s", "seconds of training, all stages", _cost("seconds_training"), 0),
    Column("evaluate s", "seconds of evaluation", _cost("seconds_evaluation"), 0),
)  # fmt: skip
STORED, LAST = COLUMNS[7], COLUMNS[0]


def headline(methods: Sequence[ComparedMethod]) -> dict[str, Any]:
    """The last line of `compare --json`: per method means over the seeds, None where a number is missing."""
    some = next(run for method in methods for run in method.runs)
    majority = next((run.majority for method in methods for run in method.runs if run.majority is not None), None)
    return {
        "tasks": some.tasks,
        "majority": majority,
        "methods": {
            method.label: {
                "last": first(method.spread(LAST)),
                "told": method.told(),
                "routed": method.routed(),
                "forgetting": first(method.spread(COLUMNS[2])),
                "stored_per_task": first(method.spread(STORED)),
            }
            for method in methods
        },
    }


def whole(methods: Sequence[ComparedMethod]) -> dict[str, Any]:
    """Everything that the page shows, for comparison.json."""
    found = headline(methods)
    for method in methods:
        numbers = {column.title: method.spread(column) for column in COLUMNS}
        found["methods"][method.label] |= {
            "seeds": method.seeds,
            "changes_earlier": method.changes_earlier,
            "needs_task": method.needs_task,
            "format_free": method.row(lambda run: run.format_free_scores),
            "mean": {title: first(value) for title, value in numbers.items()},
            "deviation": {title: None if value is None else value[1] for title, value in numbers.items()},
        }
    return found


def first(value: Spread | None) -> float | None:
    """The mean of a spread."""
    return None if value is None else value[0]


def written(value: Spread | None, digits: int) -> str:
    """A mean with its deviation as text."""
    if value is None:
        return "–"
    deviation = value[1]
    shown = f"{value[0]:,.{digits}f}".replace(",", " ")
    if deviation is None or (round(deviation, digits) == 0 and digits != 1):
        return shown
    return f"{shown} ± {deviation:,.{digits}f}".replace(",", " ")


def rows(methods: Sequence[ComparedMethod]) -> list[Mapping[str, Any]]:
    """Label, what a stage changes, seeds and written numbers of each method."""
    return [
        {
            "label": method.label,
            "changes": method.changes_earlier,
            "told_only": method.needs_task,
            "seeds": ", ".join(method.seeds),
            "values": [written(method.spread(column), column.digits) for column in COLUMNS],
        }
        for method in methods
    ]


def task_rows(methods: Sequence[ComparedMethod]) -> list[tuple[str, list[float | None]]]:
    """Scores per task: the majority answer's, then told and routed of each method."""
    found: list[tuple[str, list[float | None]]] = []
    majority = headline(methods)["majority"]
    if majority:
        found.append(("majority answer", majority))
    for method in methods:
        told, routed = method.told(), method.routed()
        if told is not None and told != routed:
            found.append((f"{method.label}, told", told))
        if routed is not None:
            found.append((method.label, routed))
    return found


def markdown(methods: Sequence[ComparedMethod], seeds: str, missing: Sequence[str] = ()) -> str:
    """The two tables as Markdown, as docs have them; before them the runs that are `missing` from them."""
    tasks = headline(methods)["tasks"]
    lines = [f"Means over the seeds {seeds}, ± their deviation; scores in percent.", ""]
    if missing:
        fewer = [f"{method.label} {', '.join(method.seeds)}" for method in methods]
        lines = ["**Not finished, and not in these tables:**", "", *(f"* {one}" for one in missing), ""]
        lines += [f"Means over the seeds that are done ({'; '.join(fewer)}), ± their deviation; scores in percent.", ""]
    lines += _table(["method", "changes earlier", *(column.title for column in COLUMNS)], [
        [row["label"], row["changes"] or "–", *row["values"]] for row in rows(methods)
    ])  # fmt: skip
    shown = [[label, *("–" if s is None else f"{s:.1f}" for s in scores)] for label, scores in task_rows(methods)]
    return "\n".join([*lines, "", *_table(["score per task", *tasks], shown), ""])


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    ruler = "|---|" + "---:|" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", ruler, *(f"| {' | '.join(row)} |" for row in body)]
