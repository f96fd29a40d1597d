"""Questions of a task that the router has not seen, against those of the tasks that it has."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.bench.routing.probe import TaskKeys
from pipeline.bench.routing.quality import auroc, percent, rejected
from pipeline.data.keys import Keys
from pipeline.prompts.routers import States
from pipeline.prompts.routers.key_features import side_by_side
from pipeline.prompts.routing import Routing
from pipeline.prompts.unfamiliar import Spread


def left_out(routing: Routing, states: States, tasks: Sequence[TaskKeys], most: int) -> dict[str, Any]:
    """Up to `most` tasks, evenly spaced, are left out in turn; means over them, in percent.

    A sample's strangeness is its distance to the kept keys of the task that scores highest, as a share of that task's
    threshold: above 1 it is flagged as unfamiliar. `auroc` compares the strangeness of the left-out task's test samples
    and of all others'; `rejected` is the share of the former above what 1 % of the latter exceed; `flagged` and
    `own_flagged` are the shares above 1.
    """
    count = min(most, len(tasks))
    spreads = [Spread.of(state) for state in states]
    rows: dict[str, tuple[float, ...]] = {}
    for number in (place * len(tasks) // count for place in range(count)):
        others = [place for place in range(len(tasks)) if place != number]
        known, kept = States([states[place] for place in others]), [spreads[place] for place in others]
        foreign = _strangeness(routing, tasks[number].test, known, kept)
        own = torch.cat([_strangeness(routing, tasks[place].test, known, kept) for place in others])
        flagged = [float((part > 1).double().mean()) for part in (foreign, own)]
        rows[tasks[number].name] = (auroc(foreign, own), rejected(foreign, own), *flagged)
    names = ("auroc", "rejected", "flagged", "own_flagged")
    means = (percent(statistics.fmean(column)) for column in zip(*rows.values(), strict=True))
    return dict(zip(names, means, strict=True)) | {"tasks": {name: percent(row[0]) for name, row in rows.items()}}


def _strangeness(routing: Routing, keys: Keys, states: States, spreads: Sequence[Spread]) -> Tensor:
    """The distance of each sample [N] to its task's kept keys, as a share of the threshold."""
    tasks = routing.scores(keys, states).argmax(1)
    found, vectors = torch.empty(len(tasks), dtype=torch.double), side_by_side(keys)
    for task in tasks.unique().tolist():
        mine = tasks == task
        found[mine] = spreads[task].distances(vectors[mine]) / spreads[task].threshold
    return found
