"""What routing costs a run: scores with the task told and routed, and the tasks that it takes for each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from pipeline.metrics.continual import routing_costs, routing_loss_per_task
from pipeline.report.predictions import NEAREST, RIGHT, Pictures, prepared_samples, routes, routing_shares
from pipeline.runs.folder import RunFolder

PAIRS = 10  # of tasks that the page shows with examples
EXAMPLES = 3  # of each pair

Line = dict[str, Any]


def told_rows(run: RunFolder) -> list[dict[str, Any]]:
    """Per task the score with the task told, routed and their difference, and who takes the task's samples.

    The means are the last row. Empty where no scores with the task told were measured.
    """
    told, routed = run.told_scores, run.last_scores
    if told is None:
        return []
    shares, right = confusion_of(run), run.routing.get("accuracy") or [None] * len(run.tasks)
    rows = []
    for task, own, found, lost, share in zip(
        run.tasks, told, routed, routing_loss_per_task(told, routed), right, strict=True
    ):
        others = {name: percent for name, percent in shares.get(task, {}).items() if name != task and percent > 0}
        taker = max(others, key=others.__getitem__, default=None)
        taken = f"{taker} ({others[taker]:.1f} %)" if taker is not None else ""
        rows.append({"name": task, "told": own, "routed": found, "lost": lost, "right": share, "taken_by": taken})
    seen = (run.last_stage or 0) + 1
    costs, known = routing_costs(told[:seen], routed[:seen]), [share for share in right if share is not None]
    means = {"told": costs["told"], "routed": run.metrics()["last"], "lost": costs["routing_loss"]}
    return [*rows, {"name": "mean", **means, "right": mean(known) if known else None, "taken_by": ""}]


def confusion_of(run: RunFolder) -> Mapping[str, Mapping[str, float]]:
    """Own task -> task whose set ranks first -> percent; from the predictions for runs of earlier versions."""
    return run.confusion or routing_shares(run).get(NEAREST, {})


def confused_pairs(run: RunFolder) -> list[dict[str, Any]]:
    """The pairs of tasks with the largest shares of misrouted samples in the last evaluation, with examples.

    A pair has `task`, `taken_by`, its number of `samples`, their `percent` of the task's samples, their mean scores
    `routed` and `told` in percent, and examples: at first samples whose score the routing lowers. `told` is None where
    it was not measured.
    """
    if not routes(run):
        return []
    predictions = run.last_predictions()
    misrouted = {
        (task, taker): lines
        for task, found in predictions.items()
        for taker, lines in _by_taker(run.set_names, task, found).items()
    }
    shares = {pair: 100.0 * len(lines) / len(predictions[pair[0]]) for pair, lines in misrouted.items()}
    largest = sorted(misrouted, key=lambda pair: -shares[pair])[:PAIRS]
    told = run.told_predictions() if largest else {}
    return [
        {"task": task, "taken_by": taker, "percent": shares[task, taker], "samples": len(misrouted[task, taker])}
        | _costs(run, task, misrouted[task, taker], told.get(task))
        for task, taker in largest
    ]


def _by_taker(sets: Sequence[str], task: str, lines: Sequence[Line]) -> dict[str, list[Line]]:
    """The samples of a task whose most similar set is another one, by that set."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        similarity = line.get("similarity") or []
        if task in sets and sets.index(task) < len(similarity) <= len(sets):
            first = sets[max(range(len(similarity)), key=similarity.__getitem__)]
            if first != task:
                found.setdefault(first, []).append(line)
    return found


def _costs(run: RunFolder, task: str, lines: Sequence[Line], told: Mapping[str, Line] | None) -> dict[str, Any]:
    """Mean scores of misrouted samples of a task, and examples; `told` has the answers that change with it told."""
    # Telling the task changes no answer of a question that gets no sets at all.
    pairs = [(line, None if told is None else told.get(str(line.get("id")), line)) for line in lines]
    gain = [0.0 if own is None else (own.get("score") or 0.0) - (line.get("score") or 0.0) for line, own in pairs]
    chosen = [pairs[place] for place in sorted(range(len(pairs)), key=lambda place: -gain[place])[:EXAMPLES]]
    samples = prepared_samples(run, task, [str(line.get("id")) for line, _ in chosen])
    pictures = Pictures(run, task, lines, samples)
    examples = []
    for line, own in chosen:
        sample = samples.get(str(line.get("id")))
        examples.append(
            {
                "id": line.get("id", ""),
                "question": line.get("question") or (sample.question if sample else ""),
                "answer": line.get("answer", ""),
                "routed": line.get("prediction", ""),
                "told": None if own is None else own.get("prediction", ""),
                "right": (line.get("score") or 0) >= RIGHT,
                "told_right": own is not None and (own.get("score") or 0) >= RIGHT,
                **pictures.of(line),
            }
        )
    owns = [own for _, own in pairs if own is not None]
    return {"routed": _mean_score(lines), "told": _mean_score(owns) if owns else None, "examples": examples}


def _mean_score(lines: Sequence[Line]) -> float:
    return 100.0 * mean(line.get("score") or 0.0 for line in lines)
