"""The tiles at the head of a report: the numbers by which a run is judged, each with what it stands on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.metrics.intervals import LEVEL
from pipeline.report.numbers import NONE, amount, fixed, limits, percent
from pipeline.report.scores import overall
from pipeline.report.tables import known_mean, seed_rows
from pipeline.runs.folder import RunFolder


@dataclass(frozen=True)
class Tile:
    """One number of the headline: its name, its value as text, and one line about it."""

    name: str
    value: str
    text: str


def tiles(run: RunFolder, runs: Sequence[RunFolder]) -> list[Tile]:
    """The headline of `run`; `runs` are it and those it is compared with, among which its other seeds are."""
    metrics = run.metrics()
    # A run that learned nothing has no stage; its scores are the frozen model's.
    last = metrics.get("last") if metrics else known_mean(run.last_scores)
    samples, limit = overall(run)
    seen = (run.last_stage or 0) + 1
    of_all = "" if run.last_stage is None or seen == len(run.tasks) else f" after {seen} of {len(run.tasks)} stages"
    confident = "" if limit is None else f"{100 * LEVEL:.0f} %: {limits(limit)}"
    reference = [
        f"{name} {percent(mean)}"
        for name, scores in (("majority answer", run.majority), ("zero-shot", run.zero_shot))
        if (mean := known_mean(scores)) is not None
    ]
    return [
        Tile("last", percent(last), f"mean score{of_all}" + (f"; {confident}" if confident else "")),
        Tile("forgetting", percent(metrics.get("forgetting")), _forgetting(run)),
        Tile("routing", percent(known_mean(run.routing.get("accuracy"))), "of the test samples rank their task first"),
        Tile("told − routed", percent(metrics.get("routing_loss")), _routing(metrics.get("told"))),
        Tile("gain", percent(metrics.get("gain")), "last minus zero-shot; " + (", ".join(reference) or "not measured")),
        Tile("test samples", amount(samples), f"of {sum(s is not None for s in run.last_scores)} tasks"),
        _deviation(run, runs),
    ]


def _forgetting(run: RunFolder) -> str:
    if run.last_stage is None or run.last_stage == 0:
        return "needs two learned tasks"
    return f"best score minus the last, mean of {run.last_stage} earlier task{'s' if run.last_stage > 1 else ''}"


def _routing(told: float | None) -> str:
    return "not measured" if told is None else f"what routing costs; {percent(told)} with the task told"


def _deviation(run: RunFolder, runs: Sequence[RunFolder]) -> Tile:
    """How far `last` differs between the seeds of the run's recipe among the runs that are compared."""
    name = "over seeds"
    group = f"{run.state.get('recipe') or run.config.get('name')}, {run.method}"
    row = next((row for row in seed_rows(runs) if row["name"] == group), None)
    last = None if row is None else row["values"][len(runs[0].tasks)]
    if row is None or last is None:
        return Tile(name, NONE, "one seed; name runs with other seeds to see how far last differs")
    return Tile(name, f"± {fixed(last[1], 1)}", f"deviation of last, mean {percent(last[0])}; seeds {row['seeds']}")
