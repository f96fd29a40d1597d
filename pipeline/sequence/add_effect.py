"""What one more task does to the answers of the earlier ones: foretold from the keys alone, then with the learned set.

A new set never changes an earlier one, but it may be inserted beside it, or be chosen instead, for questions that look
and sound like its own. Which questions these are follows from prototypes and keys, so it is known before training. It
is counted, and the gate that is advised is chosen, on samples that were held out of training; test sets are for scoring
alone.
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
from pipeline.config.method import MethodOptions
from pipeline.config.recipe import Recipe
from pipeline.data.stage_data import StageData
from pipeline.files.paths import command
from pipeline.methods import make_method
from pipeline.prompts.routers import States
from pipeline.ranks.world import World
from pipeline.runs.folder import read_run
from pipeline.sequence.data import RunData, open_data

NOTICED = 1.0  # percent of an earlier task's samples: less than this is not worth a word
OFTEN = 5.0  # percent of an earlier task's samples that get the new set: less cannot cost much
STEP = 0.001  # gates are advised in steps of this


@dataclass(frozen=True)
class Effect:
    """What the newest set does to one earlier task, in percent of `samples` of its samples.

    `held_out` tells whether no stage has learned from them. `inserted`: they get it, beside others or alone. `first`:
    it is the most similar of all. `before` and `after` are the task's scores on its test set around the new stage,
    None where not measured; nothing is chosen by them.
    """

    task: str
    samples: int
    held_out: bool
    inserted: float
    first: float
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True)
class Interference:
    """The effects on all earlier tasks, and the gate that would end most of them.

    `gate` is the largest gate, in steps of `STEP`, with which the newest set is inserted for at most one in a hundred
    of these samples of every earlier task, those tasks left out to which it is often nearer than their own set (see
    `taken`); None where the run's own gate does that already or no gate can. `remaining` are the percent of each of
    these tasks' samples that still get the set with it, counted.
    """

    effects: list[Effect]
    gate: float | None = None
    remaining: dict[str, float] | None = None

    @property
    def taken(self) -> list[str]:
        """The tasks whose samples are often more similar to the newest set than to their own: no gate changes that."""
        return [effect.task for effect in self.effects if effect.first >= NOTICED]

    def advised_json(self) -> dict[str, Any]:
        """The advised gate and what it leaves."""
        return {"gate": self.gate, "remaining": self.remaining or {}}

    def effects_json(self) -> list[dict[str, Any]]:
        """The effects as JSON objects."""
        return [asdict(effect) for effect in self.effects]


def foretell(run: Path, recipe: Recipe) -> Interference:
    """The effect of the recipe's last task on each earlier one, before it is trained; all tasks have to be prepared.

    A state that a router learns is not known yet: the one that it makes of the keys stands in for it. Nothing for
    methods and selections that do not compare the scores of tasks.
    """
    router = make_method(recipe.method).routing.router
    if router is None or not _routes(recipe.method):
        return Interference([])
    count = len(recipe.data.tasks) - 1
    known = source_of(run).pool
    data = _opened(recipe)
    keys = StageData([data.train[count]]).keys
    return _interference(recipe, data, States([*known.states[:count], router.observe(keys)]))


def counted(run: Path, recipe: Recipe) -> Interference:
    """The effect of the recipe's last stage, with what it has learned, and the scores around it; nothing before the
    matrix has them."""
    found = read_run(run)
    last = len(recipe.data.tasks) - 1
    if len(found.accuracy) <= last or last == 0 or None in found.accuracy[last][: last + 1]:
        return Interference([])
    measured = _interference(recipe, _opened(recipe), source_of(run).pool.states)
    effects = [
        replace(effect, before=found.accuracy[last - 1][number], after=found.accuracy[last][number])
        for number, effect in enumerate(measured.effects)
    ]
    return replace(measured, effects=effects)


def _routes(method: MethodOptions) -> bool:
    """Whether a sample's modules follow from comparing the scores of all tasks."""
    routing = make_method(method).routing
    return routing.router is not None and routing.rule.compares and not routing.rule.needs_task


def _has_gate(method: MethodOptions) -> bool:
    """Whether a gate keeps modules away from samples that fit another task better."""
    return hasattr(method, "gate") and "gate" in make_method(method).routing.rule.Options.model_fields


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
        """Which samples [N] get the newest set."""
        chosen = make_method(method).routing.inference(self.scores, self.number, self.has_image)
        return (chosen.numbers == self.scores.shape[1] - 1).any(1)

    def behind(self) -> Tensor:
        """By how much [N] the newest set is less similar than the best earlier one; below 0: it is the first."""
        return self.scores[:, :-1].amax(1) - self.scores[:, -1]


def _interference(recipe: Recipe, data: RunData, states: States) -> Interference:
    """What the newest set does to the earlier tasks; `states` are the router's of all tasks, the newest last."""
    method = recipe.method.after(len(states))
    found, effects = [], []
    for number in range(len(states) - 1):
        similar, held_out = _similarities(recipe, data, states, number)
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


def _similarities(recipe: Recipe, data: RunData, states: States, number: int) -> tuple[Similarities, bool]:
    """The similarities of a task's samples that choices are made with, and whether those were held out."""
    part, held_out = data.for_choices(number)
    keys = StageData([part]).keys
    scores = make_method(recipe.method).routing.scores(keys, states)
    return Similarities(recipe.data.tasks[number].name, number, scores, keys.has_image), held_out


def keeping_gate(method: MethodOptions, tasks: list[Similarities]) -> float | None:
    """The largest gate with which at most `NOTICED` percent of each task's samples get the newest set.

    None where the method's own gate is no larger, so that it does so already.
    """
    own = getattr(method, "gate", None)
    limit = math.inf if own is None else own
    always = method.model_copy(update={"gate": None})
    for similar in tasks:
        # A set outside of the k best is never inserted, whatever the gate; of the others the nearest come first.
        distances = similar.behind()[similar.inserted(always)].sort().values.tolist()
        allowed = math.floor(len(similar.scores) * NOTICED / 100)
        if len(distances) > allowed:
            limit = min(limit, distances[allowed])
    if own is not None and limit >= own:
        return None
    if limit == math.inf:
        return None
    steps = max(0, math.ceil(limit / STEP) - 1)  # below the limit
    # The distances are rounded as float32: what counts is what the selection itself does.
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
    """What the shares of the table are shares of."""
    without = [effect.task for effect in effects if not effect.held_out]
    if len(without) == len(effects):
        samples = "training samples (this run holds none out, see data.validation_share)"
    elif without:
        samples = f"held-out samples (training samples of {', '.join(without)}, which hold none out)"
    else:
        samples = "held-out samples, which no stage has learned from,"
    scores = "; scores are those on the test sets" if any(effect.after is not None for effect in effects) else ""
    return f"percent of their {samples} that get the set of {task}, and for which it is the most similar{scores}."


def advice(found: Interference, run: Path, task: str) -> list[str]:
    """What to do about earlier tasks that the new one disturbs, in sentences; nothing where it disturbs none."""
    touched = [effect for effect in found.effects if effect.inserted >= OFTEN]
    said = []
    taken = [effect.task for effect in touched if effect.task in found.taken]
    if taken:
        said.append(
            f"{', '.join(taken)}: questions are more like {task} than like their own task, and no gate changes that. "
            f"Ask {task}'s questions in words of their own (new-task under another name), or learn {task} in a run of "
            "its own."
        )
    beside = [effect.task for effect in touched if effect.task not in taken]
    if beside and found.gate is not None and found.remaining is not None:
        left = ", ".join(f"{name} {share:.1f}" for name, share in found.remaining.items())
        said.append(
            f"{', '.join(beside)}: the set of {task} is inserted beside their own. With "
            f"`{command('add', run, task, '--gate', f'{found.gate:g}')}` it is inserted for at most 1 in 100 "
            f"of these samples (percent: {left}). No set is learned anew by that, and earlier rows of the matrix stay "
            "as they were measured."
        )
    if touched and any(effect.after is not None for effect in found.effects):
        said.append(
            f"To do without it: `{command('export', run, 'adapter')}`, then "
            f"`{command('prune', 'adapter', task, '--into', 'smaller')}`; the earlier sets are what they were."
        )
    return said
