"""Routers side by side: how often a sample's own task is recognised, and what that costs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.bench import measure
from pipeline.bench.routing.left_out import left_out
from pipeline.bench.routing.probe import TaskKeys
from pipeline.bench.routing.quality import calibration_error, own_ranks, percent
from pipeline.config.method import Choice
from pipeline.prompts.calibration import Calibration
from pipeline.prompts.routers import State, States, make_router
from pipeline.prompts.routers.kept_keys import KEPT, PER_TASK
from pipeline.prompts.routing import Routing
from pipeline.prompts.rules import make_rule


@dataclass(frozen=True)
class Asked:
    """What routers are asked for.

    Args:
        k: sets per sample.
        left_out: tasks that are left out in turn (0: none).
        keys_per_task: samples of a task whose keys are kept.
    """

    k: int = 3
    left_out: int = 0
    keys_per_task: int = PER_TASK


def compare(tasks: Sequence[TaskKeys], routers: Mapping[str, Choice], asked: Asked) -> dict[str, dict[str, Any]]:
    """The measurements of each router by its name."""
    found = {}
    for name, choice in routers.items():
        # With `flag` the states keep keys, so that every router's scores are calibrated.
        routing = Routing(make_router(choice), make_rule("hard"), unfamiliar="flag", keys_per_task=asked.keys_per_task)
        found[name] = _measured(routing, tasks, asked)
        measure.tell(f"{name}: {found[name]['first']:.2f} % first, {found[name]['seconds']:.1f} s")
    return found


def _measured(routing: Routing, tasks: Sequence[TaskKeys], asked: Asked) -> dict[str, Any]:
    made: list[tuple[States, Calibration]] = []

    def fit() -> None:
        made.append(_fitted(routing, [routing.observe(task.train, task=task.name) for task in tasks]))

    fitting = measure.seconds(fit)
    (states, calibration), parts = made[0], list[_Part]()

    def score() -> None:
        for number, task in enumerate(tasks):
            parts.append(_part(routing.scores(task.test, states), calibration, number, asked.k))

    scoring = measure.seconds(score)
    samples = sum(len(task.test.text) for task in tasks)
    first = [part.first for part in parts]
    worst = first.index(min(first))
    result = {
        "first": percent(statistics.fmean(first)),
        "worst": percent(first[worst]),
        "within_k": percent(statistics.fmean(part.within for part in parts)),
        "bytes_per_task": round(statistics.fmean(_needed_bytes(routing, state) for state in states)),
        "seconds": round(fitting + scoring, 3),
        "lost": percent(1 - statistics.fmean(first)),
        "worst_task": tasks[worst].name,
        "rank": round(statistics.fmean(part.rank for part in parts), 3),
        "calibration_error": _calibration_error(parts),
        "fit_s": round(fitting, 3),
        "score_ms_per_1000": round(1e6 * scoring / samples, 2),
        "tasks": {task.name: percent(share) for task, share in zip(tasks, first, strict=True)},
    }
    if asked.left_out:
        result["left_out"] = left_out(routing, states, tasks, asked.left_out)
    return result


def _fitted(routing: Routing, states: Sequence[State]) -> tuple[States, Calibration]:
    """The states of T tasks and the calibration: all that is made before the first question."""
    known = States(states)
    routing.fitted(known)
    calibration = routing.calibration(known)
    assert calibration is not None
    return known, calibration


def _needed_bytes(routing: Routing, state: State) -> int:
    """Bytes of a task's state that the router itself needs, without keys that are kept for the calibration alone."""
    needs_keys = routing.router is not None and routing.router.needs_keys
    return sum(value.nbytes for name, value in state.items() if needs_keys or not name.startswith(KEPT))


@dataclass(frozen=True)
class _Part:
    """What is counted of one task's test samples."""

    first: float
    within: float
    rank: float
    right: Tensor  # [n]
    confidence: Tensor  # [n] probability of the best task


def _part(scores: Tensor, calibration: Calibration, own: int, k: int) -> _Part:
    ranks = own_ranks(scores, own)
    right, within = ranks == 1, ranks <= k
    confidence = calibration.log_probabilities(scores).amax(1).exp()
    first, among, rank = (float(each.double().mean()) for each in (right, within, ranks))
    return _Part(first, among, rank, right, confidence)


def _calibration_error(parts: Sequence[_Part]) -> float:
    """The calibration error in percent, every task counting the same."""
    weights = torch.cat([torch.full((len(part.right),), 1.0 / len(part.right)) for part in parts])
    confidence, right = (torch.cat([getattr(part, name) for part in parts]) for name in ("confidence", "right"))
    return percent(calibration_error(confidence, right, weights))
