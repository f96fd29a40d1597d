"""What a new task does to earlier ones, as a table and sentences for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from pipeline.files.paths import command
from pipeline.runs.layout import CONFIG
from pipeline.sequence.add_effect import Effect, Interference

OFTEN = 5.0  # percent of an earlier task's samples that receive other sets; smaller shares give no advice
LISTED = 20  # most earlier tasks in the table
EXACT = 98.0  # percent of the new task's samples that find their own set; nothing is said above


def effect_table(effects: Sequence[Effect], name: str) -> Table:
    """The effects as a table for the terminal, all in percent: all of them, or the `LISTED` largest and the rest as one
    row."""
    scored = any(effect.after is not None for effect in effects)
    table = Table(box=SIMPLE_HEAD, padding=0)
    table.add_column("earlier task", overflow="fold")
    titles = ("samples", f"gets {name}", f"{name} first", "other sets", *(("score before", "after") if scored else ()))
    for title in titles:
        table.add_column(escape(title), justify="right")
    ranked = sorted(effects, key=lambda effect: (effect.changed, effect.inserted), reverse=True)
    largest = {effect.task for effect in ranked[:LISTED]}
    for effect in effects:
        if effect.task in largest:
            scores = [effect.before, effect.after] if scored else []
            values = (effect.inserted, effect.first, effect.changed, *scores)
            table.add_row(escape(effect.task), str(effect.samples), *map(_number, values))
    left = ranked[LISTED:]
    if left:
        most = [max(getattr(effect, name) for effect in left) for name in ("inserted", "first", "changed")]
        samples = str(sum(effect.samples for effect in left))
        table.add_row(f"{len(left)} others, at most", samples, *map(_number, most), *([""] * 2 if scored else []))
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def basis(effects: Sequence[Effect], task: str) -> str:
    """A sentence that says which samples the percentages of the table refer to."""
    without = [effect.task for effect in effects if not effect.held_out]
    if len(without) == len(effects):
        samples = "training samples (this run holds none out, see data.validation_share)"
    elif without:
        samples = f"held-out samples (training samples of {_some(without)}, which hold none out)"
    else:
        samples = "held-out samples, which no stage was trained on,"
    scores = "; scores are those on the test sets" if any(effect.after is not None for effect in effects) else ""
    return (
        f"percent of their {samples} that get the set of {task}, for which it is the most similar, and that get other "
        f"sets than before{scores}."
    )


def advice(found: Interference, run: Path, task: str) -> list[str]:
    """Sentences on which tasks are touched and how to avoid it; empty where none is."""
    touched = [effect for effect in found.effects if effect.inserted >= OFTEN]
    said = []
    taken = [effect.task for effect in touched if effect.task in found.taken]
    if taken:
        said.append(_taken(found, taken, run, task))
    beside = [effect.task for effect in touched if effect.task not in taken]
    limit = found.limit
    if beside and limit is not None:
        left = _some([f"{name} {share:.1f}" for name, share in limit.remaining.items()])
        said.append(
            f"{_some(beside)}: the set of {task} is inserted beside their own. With "
            f"`{command('add', run, task, f'--{limit.option}', f'{limit.value:g}')}` it is inserted for at most 1 in "
            f"100 of these samples (percent: {left}). Nothing is retrained, and earlier rows of the matrix stay as "
            "they were measured."
        )
    moved = [effect for effect in found.effects if effect.changed - effect.inserted >= OFTEN]
    if moved:
        shares = _some([f"{effect.task} {effect.changed - effect.inserted:.1f}" for effect in moved])
        said.append(
            f"{shares} percent: get other sets of earlier tasks than before, because the router {found.router} "
            "compares a question with all tasks together."
        )
    lost = {name: share for name, share in found.own.items() if name != task and share >= 1}
    if lost and found.own.get(task, 0.0) < EXACT:
        others = _some([f"{name} {share:.1f}" for name, share in sorted(lost.items(), key=lambda item: -item[1])])
        said.append(
            f"{task}: {found.own.get(task, 0.0):.1f} percent of its own held-out samples are most similar to its set, "
            f"the others to those of {others}."
        )
    if touched and any(effect.after is not None for effect in found.effects):
        said.append(f"`{command('undo', run)}` takes {task} back; earlier prompt sets are unchanged.")
    return said


def _taken(found: Interference, taken: Sequence[str], run: Path, task: str) -> str:
    """What can be done about tasks whose questions are more similar to the new one."""
    said = (
        f"{_some(taken)}: questions are more similar to {task} than to their own task, as the router {found.router} "
        "compares them, and neither gate nor share changes that. "
    )
    if found.remedy is None:
        return (
            f"{said}Word {task}'s questions differently (new-task under another name), or train {task} in a separate "
            "run."
        )
    left = _some([f"{name} {share:.1f}" for name, share in found.remedy.first.items()])
    chosen = f"method.router={found.remedy.router}"
    return (
        f"{said}The router {found.remedy.router} tells them apart: with it {task} is the most similar one for so many "
        f"percent of their samples: {left}. `{command('run', run / CONFIG, '--set', chosen)}` changes the run to it, "
        f"before {task} is added or afterwards: what it needs of each task is made from the prepared keys, no set is "
        "trained again, and the rows of the matrix are measured anew."
    )


def _some(words: Sequence[str]) -> str:
    """The words in a row, of many the first ones and how many more there are."""
    return ", ".join(words) if len(words) <= LISTED else f"{', '.join(words[:LISTED])} and {len(words) - LISTED} more"
