"""The interference of a new task with earlier ones, estimated from the routing keys or measured with the trained set.

A new set never changes an earlier one, but it may be selected beside it or instead of it, for samples that resemble
those of the new task. The selection depends only on the router's states and keys, so it can be estimated before
training. Shares and suggestions come from held-out samples; test sets are used for scores alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.adapter.load import source_of
from pipeline.config.method import MethodOptions, choice_name
from pipeline.config.recipe import Recipe
from pipeline.data.keys import AnyKeys
from pipeline.data.stage_data import StageData
from pipeline.methods import make_method
from pipeline.prompts.routers import States
from pipeline.prompts.routing import Routing
from pipeline.ranks.world import World
from pipeline.runs.folder import read_run
from pipeline.sequence.add_limit import (
    NOTICED,
    Limit,
    Option,
    Similarities,
    changed,
    first_of,
    percent,
    without_newest,
)
from pipeline.sequence.data import RunData, open_data

APART = "random_ridge"  # the router that tells tasks apart which share pictures or questions


@dataclass(frozen=True)
class Effect:
    """The effect of the newest set on one earlier task, in percent of `samples` of the task's samples."""

    task: str
    samples: int
    held_out: bool  # whether the samples were held out of training
    inserted: float  # share that receives the newest set, alone or beside others
    first: float  # share for which the newest set is the most similar one
    changed: float = 0.0  # share that receives other sets than before, with the newest one or without it
    before: float | None = None  # score on the task's test set before the new stage; None where not measured
    after: float | None = None  # and after it


@dataclass(frozen=True)
class Remedy:
    """What remains with another router: `first` by task as in `Effect`, for the tasks that the new one takes."""

    router: str
    first: dict[str, float]


@dataclass(frozen=True)
class Interference:
    """The effects on all earlier tasks, and what would prevent most of them.

    `limit` is the largest gate, or the smallest share, with which the newest set is inserted for at most `NOTICED`
    percent of the samples of every earlier task, except those in `taken`. It is None where the run's own suffices or
    none can. `own` are the percentages of the new task's samples for which each task ranks first, by name. `remedy` is
    another router, where one leaves the tasks in `taken` their questions.
    """

    effects: list[Effect]
    limit: Limit | None = None
    own: dict[str, float] = field(default_factory=dict)
    remedy: Remedy | None = None
    router: str = ""  # by which all of this was found

    @property
    def taken(self) -> list[str]:
        """The tasks for which the newest set often ranks first, which neither gate nor share can change."""
        return [effect.task for effect in self.effects if effect.first >= NOTICED]

    def advised_json(self) -> dict[str, Any]:
        """The suggested gate or share with the remaining percentages, and router, as a JSON object."""
        limit, remedy = self.limit, self.remedy
        return {
            **{name: limit.value if limit and limit.option == name else None for name in ("gate", "share")},
            "remaining": limit.remaining if limit else {},
            "router": remedy and {"name": remedy.router, "first": remedy.first},
        }

    def effects_json(self) -> list[dict[str, Any]]:
        """The effects as JSON objects."""
        return [asdict(effect) for effect in self.effects]


def estimate(run: Path, recipe: Recipe) -> Interference:
    """Estimate the effect of the recipe's last task on each earlier one before training; all tasks must be prepared.

    The state of a learned router is not known yet, so the state that the router computes from the keys is used instead;
    one in closed form is already as it will be. No effects are returned for methods and selections that do not compare
    the scores of tasks.
    """
    if not _routes(recipe.method):
        return Interference([])
    count = len(recipe.data.tasks) - 1
    known = source_of(run).pool
    data = _opened(recipe)
    keys = StageData([data.train[count]]).keys
    states = States([*known.states[:count], make_method(recipe.method).routing.observe(keys)])
    return _interference(recipe, data, states)


def measure(run: Path, recipe: Recipe) -> Interference:
    """Measure the effect of the recipe's finished last stage; no effects before the matrix has its scores."""
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
    """Whether a sample's modules are selected by comparing the scores of all tasks."""
    return bool(make_method(method).routing.finds)


def _opened(recipe: Recipe) -> RunData:
    return open_data(recipe, World(0, 1, 0, torch.device("cpu")))


def _interference(recipe: Recipe, data: RunData, states: States) -> Interference:
    """The effects on the earlier tasks and what would prevent them; `states` end with the newest task's."""
    names = [task.name for task in recipe.data.tasks][: len(states)]
    method = recipe.method.after(len(states))
    effects, found = _effects(method, names, data, states)
    *earlier, newest = found
    if not _routes(method):
        return Interference(effects)
    whole = Interference(
        effects,
        own={names[task]: share for task, share in first_of(newest).items()},
        router=choice_name(make_method(method).router or ""),
    )
    option = _option(method)
    if option is not None:
        limited = method.model_copy(update={"share": 1.0, "gate": None}) if option == "share" else method
        given = [_similarities(limited, (number, names[number]), data, states)[0] for number in range(len(earlier))]
        spared = [similar for similar in given if similar.task not in whole.taken]
        whole = replace(whole, limit=without_newest(method, spared, option))
    return replace(whole, remedy=_remedy(method, whole, data, states))


def _effects(
    method: MethodOptions, names: Sequence[str], data: RunData, states: States
) -> tuple[list[Effect], list[Similarities]]:
    """The effects on the earlier tasks, and how samples of all tasks fit, the newest last."""
    routing = make_method(method).routing
    earlier = States(states[:-1])
    found, effects = [], []
    for number, name in enumerate(names):
        similar, keys, held_out = _similarities(method, (number, name), data, states)
        found.append(similar)
        if number == len(names) - 1:
            break
        before = routing.route(keys, earlier, number).selection
        effects.append(
            Effect(
                name,
                samples=len(similar.scores),
                held_out=held_out,
                inserted=percent(similar.inserted(method)),
                first=percent(similar.behind() < 0) if _routes(method) else 0.0,
                changed=percent(changed(before, similar.selection(method))),
            )
        )
    return effects, found


def _option(method: MethodOptions) -> Option | None:
    """Which of a rule's options decides how far behind the best a set is still inserted; None where it has neither.

    A gate compares similarities, whose scale depends on the router; a share needs the keys that a router in closed form
    keeps anyway.
    """
    routing = make_method(method).routing
    has = {name for name in ("gate", "share") if hasattr(method, name) and name in routing.rule.Options.model_fields}
    gated = getattr(method, "gate", None) is not None
    if "share" in has and not gated and routing.keeps_keys:
        return "share"
    return "gate" if "gate" in has else None


def _similarities(
    method: MethodOptions, task: tuple[int, str], data: RunData, states: States
) -> tuple[Similarities, AnyKeys, bool]:
    """How the samples of a task that choices are made with fit all tasks; their keys; whether they were held out."""
    number, name = task
    part, held_out = data.for_choices(number)
    keys = StageData([part]).keys
    routing: Routing = make_method(method).routing
    scores = routing.compared_scores(keys, states)
    bare = routing.route(keys, states, number).unfamiliar if routing.unfamiliar == "zero_shot" else None
    return Similarities(name, number, scores, keys.has_image, bare), keys, held_out


def _remedy(method: MethodOptions, found: Interference, data: RunData, states: States) -> Remedy | None:
    """Another router, where the run's own takes questions of earlier tasks for the new one's and this one does not."""
    router = make_method(method).routing.router
    if not found.taken or router is None or router.needs_keys or not hasattr(method, "router"):
        return None
    other = method.model_copy(update={"router": APART})
    routing: Routing = make_method(other).routing
    if routing.router is None or not routing.router.needs_keys:
        return None  # the method's router is not that of its options
    # As a run makes them that changes its router: of the prepared keys, in place of what its stages keep now.
    states = States([routing.observe(StageData([data.train[number]]).keys) for number in range(len(states))])
    first = {}
    for number, effect in enumerate(found.effects):
        if effect.task in found.taken:
            similar, *_ = _similarities(other, (number, effect.task), data, states)
            first[effect.task] = percent(similar.behind() < 0)
    before = {effect.task: effect.first for effect in found.effects}
    helps = all(share < NOTICED or share <= before[name] / 2 for name, share in first.items())
    return Remedy(APART, first) if helps else None
