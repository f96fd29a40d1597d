"""What is wrong with the tasks of a finished run, by its test scores: `add` says the same of the task that it adds.

All of it is read from the run's folder, so that a page can say it at any time; no tensors are read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config.load import load_run
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.runs.data_use import DATA
from pipeline.runs.folder import RunFolder
from pipeline.runs.layout import after_folder, zero_shot_folder
from pipeline.sequence.reasons import FEW_HELD_OUT, SMALL, reasons

MUCH = 5.0  # percent of a task's score that routing may cost before it is said
SAID = 2  # causes in a line; the JSON object has all
MOST_RUNS = 200  # run folders beside this one in which the frozen model's score is looked for


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a task.

    `kind` is not_learned (no better than the most frequent training answer), no_gain (no better than the frozen model),
    or misrouted (much better with the task told).
    """

    task: str
    kind: Literal["not_learned", "no_gain", "misrouted"]
    score: float  # percent of the test set; of a misrouted task as it is routed, else with its own module at its best
    against: float  # what it was compared with
    causes: list[str] = field(default_factory=list)
    samples: int | None = None  # of the test set

    @property
    def sentence(self) -> str:
        """The fault as one line."""
        few = self.samples is not None and self.samples < FEW_HELD_OUT
        unsure = f" {self.samples} test samples say little." if few else ""
        if self.kind == "misrouted":
            where = f" {self.causes[0]}" if self.causes else ""
            return f"{self.task} scores {self.score:.1f}, and with the task told {self.against:.1f}.{where}{unsure}"
        if self.kind == "no_gain":
            said = f"{self.task} gained nothing: it scores {self.score:.1f}, and the frozen model {self.against:.1f}."
        else:
            said = (
                f"{self.task} was not learned: it scores {self.score:.1f}, and the most frequent training answer "
                f"{self.against:.1f}."
            )
        return f"{said}{unsure} It may be because {'; or because '.join(self.causes[:SAID] or [SMALL])}."

    def to_json(self) -> dict[str, Any]:
        """The fault with its sentence as a JSON object."""
        return {**asdict(self), "sentence": self.sentence}


def lines_of(run: RunFolder) -> list[str]:
    """What a page says first of a run: its faults, or in one line that its tasks were learned; [] where none is scored.

    The causes of faults need the recipe, and are left out of a run whose config.yaml is gone or damaged.
    """
    try:
        recipe = load_run(run.path)
    except UserError:
        recipe = None
    return [fault.sentence for fault in faults_of(run, recipe)] or _all_learned(run)


def _all_learned(run: RunFolder) -> list[str]:
    """One line about a run without faults, with what its tasks were compared with; [] where that is nothing."""
    if run.last_stage is None or run.learned_nothing:
        return []
    seen = run.last_stage + 1
    references = (("the most frequent training answer", run.majority), ("the frozen model", _frozen(run)))
    known = [name for name, row in references if row and None not in row[:seen]]
    if not known:
        return []
    which = "The task was" if seen == 1 else f"All {seen} tasks{' so far' if seen < len(run.tasks) else ''} were"
    score = "it scores" if seen == 1 else "each scores"
    return [f"{which} learned: with its own module {score} above {' and '.join(known)}."]


def faults_of(run: RunFolder, recipe: Recipe | None) -> list[Fault]:
    """What is wrong with the tasks that were scored after the run's last stage; empty where nothing is.

    A module's score is the best of that after its own stage and that with the task told, so routing and later stages
    do not make a task count as not learned. The frozen model's score is the run's, or that of a run beside it.
    """
    last = run.last_stage
    if last is None or run.learned_nothing:
        return []
    frozen = _frozen(run)
    told = run.told_scores or [None] * len(run.tasks)
    found = []
    for number, task in enumerate(run.tasks[: last + 1]):
        routed = run.last_scores[number]
        own = max(score for score in (routed, run.accuracy[number][number], told[number]) if score is not None)
        samples = _samples(run, task, "test")
        majority, zero_shot = (row[number] if row else None for row in (run.majority, frozen))
        if majority is not None and own <= majority:
            found.append(Fault(task, "not_learned", own, majority, _causes(run, recipe, number, majority), samples))
        elif zero_shot is not None and own <= zero_shot:
            found.append(Fault(task, "no_gain", own, zero_shot, _causes(run, recipe, number, zero_shot), samples))
        told_score = told[number]
        if told_score is not None and routed is not None and told_score - routed >= MUCH:
            found.append(Fault(task, "misrouted", routed, told_score, _taken(run, task), samples))
    return found


def _frozen(run: RunFolder) -> Sequence[float | None] | None:
    """The frozen model's scores [T], the run's own or those of runs beside it; None where there are none."""
    return run.zero_shot or _kept_zero_shot(run, (run.last_stage or 0) + 1)


def _causes(run: RunFolder, recipe: Recipe | None, number: int, against: float) -> list[str]:
    """Why a task may not have been learned; the format only where it hides more than the score compared `against`."""
    free = (run.format_free_scores or [None] * len(run.tasks))[number]
    trained_on = _samples(run, run.tasks[number], "train")
    if recipe is None or trained_on is None:  # a run of an earlier version does not say the latter
        return []
    return reasons(recipe, trained_on, free if free is not None and free > against else None)


def _taken(run: RunFolder, task: str) -> list[str]:
    """Which task most of the misrouted questions are taken for, and for how many."""
    others = {name: share for name, share in (run.confusion.get(task) or {}).items() if name != task and share > 0}
    if not others:
        return []
    most = max(others, key=lambda name: others[name])
    return [f"For {others[most]:.1f} percent of its questions the router ranks {most} first (docs/routing.md)."]


def _samples(run: RunFolder, task: str, split: str) -> int | None:
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        return int(run.state[DATA][task][split]["used"])
    return None


def _kept_zero_shot(run: RunFolder, seen: int) -> Sequence[float | None] | None:
    """The frozen model's scores [T] of runs beside this one, on the same test sets with the same model; else None."""
    wanted = {task: _score_file(after_folder(run.path, seen), task) for task in run.tasks[:seen]}
    found: dict[str, float] = {}
    beside = (path for path in run.path.resolve().parent.glob(f"*/{zero_shot_folder(Path()).as_posix()}"))
    for folder in itertools.islice(beside, MOST_RUNS):
        for task, own in wanted.items():
            other = _score_file(folder, task) if own and task not in found else {}
            if own and other and _comparable(own) == _comparable(other):
                found[task] = float(other["score"])
        if len(found) == len(wanted):
            break
    return [found.get(task) for task in run.tasks] if found else None


def _comparable(score: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs' scores of a task have to agree in: data, model and metric, not where modules are inserted."""
    made_with = {name: value for name, value in score["made_with"].items() if name != "insertion"}
    return {**made_with, **{name: score.get(name) for name in ("metric", "scoring", "samples")}}


def _score_file(folder: Path, task: str) -> dict[str, Any]:
    """The content of a task's score file; {} where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((folder / f"{task}.score.json").read_text("utf-8"))
        if isinstance(content, dict) and isinstance(content.get("made_with"), dict) and "score" in content:
            return content
    return {}
