"""What one more task does to the answers of the earlier ones: foretold from the keys alone, then as it turned out.

A new set never changes an earlier one, but it may be inserted beside it, or be chosen instead, for questions that look
and sound like its own. Which questions these are follows from prototypes and keys, so it is known before training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from pipeline.config import Recipe
from pipeline.given_path import command
from pipeline.run_folder import read_run

NOTICED = 1.0  # percent of an earlier task's questions, or points of its score: less than this is not worth a word
OFTEN = 5.0  # percent of an earlier task's questions that get the new set: less cannot cost much


@dataclass(frozen=True)
class Effect:
    """What the newest set does to one earlier task, in percent of its test questions.

    `inserted`: they get it, beside others or alone. `first`: it is the most similar of all. `gate`: the gate that would
    keep it from all but one in a hundred of those that are still most similar to an earlier set; None without such.
    `before` and `after` are the task's scores around the new stage, None where not measured.
    """

    task: str
    inserted: float
    first: float
    gate: float | None
    before: float | None = None
    after: float | None = None

    @property
    def lost(self) -> float:
        return 0.0 if self.before is None or self.after is None else self.before - self.after


def foretell(run: Path, recipe: Recipe) -> list[Effect]:
    """The effect of the recipe's last task on each earlier one, before it is trained; all tasks have to be prepared.

    The task's own prototype is not known yet: the one that minimises the prototype loss stands in for it. Nothing for
    methods and selections that do not compare prototypes.
    """
    import torch

    from pipeline.adapter import source_of
    from pipeline.data.collate import StageData
    from pipeline.distributed import World
    from pipeline.evaluate import task_similarity
    from pipeline.methods import make_method
    from pipeline.prompts.pool import PromptPool
    from pipeline.prompts.routing import provisional_prototype
    from pipeline.run_data import open_data

    method = make_method(recipe.method)
    if not method.learns_prototypes or recipe.method.selection != "topk":
        return []
    count = len(recipe.data.tasks) - 1
    known = source_of(run).pool
    data = open_data(recipe, World(0, 1, 0, torch.device("cpu")))
    keys = StageData([data.train[count]]).keys
    stand_in = provisional_prototype(keys.image, keys.text, keys.has_image)[None]
    name = recipe.data.tasks[count].name
    pool = PromptPool(
        [*known.names[:count], name],
        torch.cat([known.prompts[:count], torch.zeros_like(known.prompts[:1])]),
        torch.cat([known.prototypes[:count], stand_in.to(known.prototypes)]),
    )
    effects = []
    for number, test in enumerate(data.tests[:count]):
        scores = task_similarity(test, pool, recipe.method.image_weight)
        chosen = method.answering_sets(pool, number, scores, test.data.keys.has_image)
        inserted = (chosen == count).any(1).tolist()
        effects.append(_effect(test.name, scores.tolist(), inserted))
    return effects


def counted(run: Path, task: str) -> list[Effect]:
    """The effect of the stage of `task`, the run's last, from matrix and predictions; nothing before they are whole."""
    found = read_run(run)
    last = found.tasks.index(task)
    if len(found.accuracy) <= last or last == 0:
        return []
    effects = []
    for number, (name, lines) in enumerate(found.last_predictions().items()):
        if name == task:
            continue
        scores, inserted = [line["similarity"] for line in lines], [task in line["selected"] for line in lines]
        before, after = found.accuracy[last - 1][number], found.accuracy[last][number]
        effects.append(replace(_effect(name, scores, inserted), before=before, after=after))
    return effects


def _effect(task: str, scores: list[list[float]], inserted: list[bool]) -> Effect:
    """`scores` are the similarities [N, T] of a task's questions, the newest set last."""
    behind = [max(row[:-1]) - row[-1] if len(row) > 1 else math.inf for row in scores]  # below 0: the new set is first
    still = sorted(distance for distance in behind if distance >= 0)
    # Rounded down, as it will be typed.
    gate = math.floor(100 * still[len(still) // 100]) / 100 if still else None
    return Effect(
        task,
        inserted=100.0 * sum(inserted) / max(1, len(inserted)),
        first=100.0 * sum(distance < 0 for distance in behind) / max(1, len(behind)),
        gate=gate,
    )


def effect_table(effects: list[Effect], name: str) -> Table:
    """The effects as a table for the terminal, all in percent."""
    scored = any(effect.after is not None for effect in effects)
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("earlier task", overflow="fold")
    for title in (*(("before", "after") if scored else ()), f"gets {name}", f"{name} first"):
        table.add_column(escape(title), justify="right")
    for effect in effects:
        scores = [effect.before, effect.after] if scored else []
        shown = ["–" if value is None else f"{value:.1f}" for value in (*scores, effect.inserted, effect.first)]
        table.add_row(escape(effect.task), *shown)
    return table


def advice(effects: list[Effect], recipe: Recipe, run: Path, task: str) -> list[str]:
    """What to do about earlier tasks that the new one disturbs, in sentences; nothing where it disturbs none."""
    scored = any(effect.after is not None for effect in effects)
    touched = [e for e in effects if (e.lost >= NOTICED if scored else e.inserted >= OFTEN)]
    said = []
    taken = [effect.task for effect in touched if effect.first >= NOTICED]
    if taken:
        said.append(
            f"{', '.join(taken)}: questions are more like {task} than like their own task, and no gate changes that. "
            f"Ask {task}'s questions in words of their own (new-task under another name), or learn {task} in a run of "
            "its own."
        )
    limit = math.inf if recipe.method.gate is None else recipe.method.gate
    beside = {e.task: e.gate for e in touched if e.task not in taken and e.inserted >= NOTICED}
    gates = [gate for gate in beside.values() if gate is not None and gate < limit]
    if gates:
        said.append(
            f"{', '.join(beside)}: the set of {task} is inserted beside their own. "
            f"`{command('add', run, task, '--gate', f'{min(gates):g}')}` keeps it out of these; no set is learned anew "
            "by that."
        )
    if touched and scored:
        said.append(
            f"To do without it: `{command('export', run, 'adapter')}`, then "
            f"`{command('prune', 'adapter', task, '--into', 'smaller')}`; the earlier sets are what they were."
        )
    return said
