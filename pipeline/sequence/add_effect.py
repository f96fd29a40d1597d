"""The interference of a new task with earlier ones, estimated from the routing keys or measured with the trained set.

A new set never changes an earlier one, but it may be selected beside it or instead of it, for samples that resemble
those of the new task. The selection depends only on prototypes and keys, so it can be estimated before training. Shares
and the suggested gate come from held-out samples; test sets are used for scores alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from pipeline.adapter.load import source_of
from pipeline.config.data import DataConfig
from pipeline.config.method import MethodOptions
from pipeline.config.recipe import Recipe
from pipeline.data.stage_data import StageData
from pipeline.files.paths import command
from pipeline.methods import make_method
from pipeline.prompts.routers import States
from pipeline.ranks.world import World
from pipeline.runs.folder import read_run
from pipeline.sequence.data import RunData, open_data

NOTICED = 1.0  # percent of an earlier task's samples; smaller shares are tolerated
OFTEN = 5.0  # percent of an earlier task's samples that receive the new set; smaller shares give no advice
STEP = 0.001  # resolution of suggested gates


@dataclass(frozen=True)
class Effect:
    """The effect of the newest set on one earlier task, in percent of `samples` of the task's samples."""

    task: str
    samples: int
    held_out: bool  # whether the samples were held out of training
    inserted: float  # share that receives the newest set, alone or beside others
    first: float  # share for which the newest set is the most similar one
    before: float | None = None  # score on the task's test set before the new stage; None where not measured
    after: float | None = None  # and after it


@dataclass(frozen=True)
class Interference:
    """The effects on all earlier tasks, and the gate that would prevent most of them.

    `gate` is the largest gate, in steps of `STEP`, with which the newest set is inserted for at most `NOTICED` percent
    of the samples of every earlier task, except those in `taken`. It is None where the run's gate suffices or no gate
    can. `remaining` are the measured percentages of each task's samples that still receive the set with this gate.
    """

    effects: list[Effect]
    gate: float | None = None
    remaining: dict[str, float] | None = None

    @property
    def taken(self) -> list[str]:
        """The tasks for which the newest set often ranks first, which no gate can change."""
        return [effect.task for effect in self.effects if effect.first >= NOTICED]

    def advised_json(self) -> dict[str, Any]:
        """The suggested gate and the remaining shares, as a JSON object."""
        return {"gate": self.gate, "remaining": self.remaining or {}}

    def effects_json(self) -> list[dict[str, Any]]:
        """The effects as JSON objects."""
        return [asdict(effect) for effect in self.effects]


def estimate(run: Path, recipe: Recipe) -> Interference:
    """Estimate the effect of the recipe's last task on each earlier one before training; all tasks must be prepared.

    The state of a learned router is not known yet, so the state that the router computes from the keys is used instead.
    No effects are returned for methods and selections that do not compare the scores of tasks.
    """
    router = make_method(recipe.method).routing.router
    if router is None or not _routes(recipe.method):
        return Interference([])
    count = len(recipe.data.tasks) - 1
    known = source_of(run).pool
    data = _opened(recipe)
    keys = StageData([data.train[count]]).keys
    return _interference(
        recipe.method, _names(recipe.data), data, States([*known.states[:count], router.observe(keys)])
    )


def measure(run: Path, recipe: Recipe) -> Interference:
    """Measure the effect of the recipe's finished last stage; no effects before the matrix has its scores."""
    found = read_run(run)
    last = len(recipe.data.tasks) - 1
    if len(found.accuracy) <= last or last == 0 or None in found.accuracy[last][: last + 1]:
        return Interference([])
    measured = _interference(recipe.method, _names(recipe.data), _opened(recipe), source_of(run).pool.states)
    effects = [
        replace(effect, before=found.accuracy[last - 1][number], after=found.accuracy[last][number])
        for number, effect in enumerate(measured.effects)
    ]
    return replace(measured, effects=effects)


def _routes(method: MethodOptions) -> bool:
    """Whether a sample's modules are selected by comparing the scores of all tasks."""
    routing = make_method(method).routing
    return routing.router is not None and routing.rule.compares and not routing.rule.needs_task


def _has_gate(method: MethodOptions) -> bool:
    """Whether the method's selection rule has a gate."""
    return hasattr(method, "gate") and "gate" in make_method(method).routing.rule.Options.model_fields


def _names(data: DataConfig) -> list[str]:
    return [task.name for task in data.tasks]


def _opened(recipe: Recipe) -> RunData:
    return open_data(recipe, World(0, 1, 0, torch.device("cpu")))


@dataclass(frozen=True)
class Similarities:
    """The similarities of one earlier task's samples to all sets, the newest last."""

    task: str
    number: int
    scores: Tensor  # [N, T]
    has_image: Tensor  # [N]

    def inserted(self, method: MethodOptions) -> Tensor:
        """Whether each sample [N] receives the newest set."""
        chosen = make_method(method).routing.inference(self.scores, self.number, self.has_image)
        return (chosen.numbers == self.scores.shape[1] - 1).any(1)

    def behind(self) -> Tensor:
        """The best earlier set's similarity minus the newest set's [N]; below 0 where the newest ranks first."""
        return self.scores[:, :-1].amax(1) - self.scores[:, -1]


def _interference(options: MethodOptions, names: list[str], data: RunData, states: States) -> Interference:
    """The effects on the earlier tasks and the suggested gate; `states` are the router's, the newest task's last."""
    method = options.after(len(states))
    found, effects = [], []
    for number in range(len(states) - 1):
        similar, held_out = _similarities(options, (number, names[number]), data, states)
        found.append(similar)
        effects.append(
            Effect(
                similar.task,
                samples=len(similar.scores),
                held_out=held_out,
                inserted=_percent(similar.inserted(method)),
                first=_percent(similar.behind() < 0) if _routes(method) else 0.0,
            )
        )
    whole = Interference(effects)
    if not _routes(method) or not _has_gate(method):
        return whole
    spared = [similar for similar in found if similar.task not in whole.taken]
    gate = keeping_gate(method, spared)
    if gate is None:
        return whole
    gated = method.model_copy(update={"gate": gate})
    remaining = {similar.task: _percent(similar.inserted(gated)) for similar in spared}
    return Interference(effects, gate, remaining)


def _similarities(
    options: MethodOptions, task: tuple[int, str], data: RunData, states: States
) -> tuple[Similarities, bool]:
    """The similarities of the samples of a task that choices are made with, and whether these were held out."""
    number, name = task
    part, held_out = data.for_choices(number)
    keys = StageData([part]).keys
    scores = make_method(options).routing.scores(keys, states)
    return Similarities(name, number, scores, keys.has_image), held_out


def keeping_gate(method: MethodOptions, tasks: list[Similarities]) -> float | None:
    """The largest gate with which at most `NOTICED` percent of each task's samples receive the newest set.

    None where the method's gate is already small enough.
    """
    own = getattr(method, "gate", None)
    limit = math.inf if own is None else own
    always = method.model_copy(update={"gate": None})
    for similar in tasks:
        # A set outside the k best is never inserted. Sort the distances of the others: a larger gate inserts more.
        distances = similar.behind()[similar.inserted(always)].sort().values.tolist()
        allowed = math.floor(len(similar.scores) * NOTICED / 100)
        if len(distances) > allowed:
            limit = min(limit, distances[allowed])
    if own is not None and limit >= own:
        return None
    if limit == math.inf:
        return None
    steps = max(0, math.ceil(limit / STEP) - 1)  # below the limit
    # Distances are rounded to float32, so verify the gate with the selection itself.
    while steps and any(
        _percent(s.inserted(always.model_copy(update={"gate": steps * STEP}))) > NOTICED for s in tasks
    ):
        steps -= 1
    return round(steps * STEP, 3)


def _percent(flags: Tensor) -> float:
    return 100.0 * float(flags.double().mean()) if len(flags) else 0.0


def effect_table(effects: list[Effect], name: str) -> Table:
    """The effects as a table for the terminal, all in percent."""
    scored = any(effect.after is not None for effect in effects)
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("earlier task", overflow="fold")
    for title in ("samples", f"gets {name}", f"{name} first", *(("score before", "after") if scored else ())):
        table.add_column(escape(title), justify="right")
    for effect in effects:
        scores = [effect.before, effect.after] if scored else []
        shown = ["–" if value is None else f"{value:.1f}" for value in (effect.inserted, effect.first, *scores)]
        table.add_row(escape(effect.task), str(effect.samples), *shown)
    return table


def basis(effects: list[Effect], task: str) -> str:
    """A sentence that says which samples the percentages of the table refer to."""
    without = [effect.task for effect in effects if not effect.held_out]
    if len(without) == len(effects):
        samples = "training samples (this run holds none out, see data.validation_share)"
    elif without:
        samples = f"held-out samples (training samples of {', '.join(without)}, which hold none out)"
    else:
        samples = "held-out samples, which no stage was trained on,"
    scores = "; scores are those on the test sets" if any(effect.after is not None for effect in effects) else ""
    return f"percent of their {samples} that get the set of {task}, and for which it is the most similar{scores}."


def advice(found: Interference, run: Path, task: str) -> list[str]:
    """Sentences on how to avoid the interference with earlier tasks; empty where there is none."""
    touched = [effect for effect in found.effects if effect.inserted >= OFTEN]
    said = []
    taken = [effect.task for effect in touched if effect.task in found.taken]
    if taken:
        said.append(
            f"{', '.join(taken)}: questions are more similar to {task} than to their own task, and no gate changes "
            f"that. Word {task}'s questions differently (new-task under another name), or train {task} in a separate "
            "run."
        )
    beside = [effect.task for effect in touched if effect.task not in taken]
    if beside and found.gate is not None and found.remaining is not None:
        left = ", ".join(f"{name} {share:.1f}" for name, share in found.remaining.items())
        said.append(
            f"{', '.join(beside)}: the set of {task} is inserted beside their own. With "
            f"`{command('add', run, task, '--gate', f'{found.gate:g}')}` it is inserted for at most 1 in 100 "
            f"of these samples (percent: {left}). Nothing is retrained, and earlier rows of the matrix stay as they "
            "were measured."
        )
    if touched and any(effect.after is not None for effect in found.effects):
        said.append(
            f"To undo: `{command('export', run, 'adapter')}`, then "
            f"`{command('prune', 'adapter', task, '--into', 'smaller')}`; earlier prompt sets are unchanged."
        )
    return said
