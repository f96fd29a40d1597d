"""Whether a run's last task was learned: its answers to held-out samples against its most frequent training answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.config.recipe import Recipe
from pipeline.data.stage_data import StageData
from pipeline.files.paths import command
from pipeline.methods import make_method
from pipeline.metrics.blind import majority_score, recurring_share
from pipeline.prompts.parts.base import Part, kind_of
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.world import on_main
from pipeline.runs.layout import CONFIG, held_out_folder
from pipeline.sequence.data import RunData
from pipeline.sequence.evaluation import Evaluator
from pipeline.sequence.format_free import format_free_score
from pipeline.sequence.reasons import FEW_HELD_OUT, SMALL, reasons
from pipeline.sequence.test_set import TestSet

MANY_RECUR = 50.0  # percent of answers that are known, from which on an answer head is worth its name


@dataclass(frozen=True)
class Learned:
    """The scores in percent on a task's held-out samples, which no stage was trained on."""

    task: str
    samples: int
    score: float  # with the task told
    majority: float  # of the most frequent training answer, given to every sample
    format_free: float | None  # like `score`, see `pipeline.metrics.format_free`; None where it is not known
    trained_on: int  # training samples
    recurring: float = 0.0  # the share of these samples whose answer at least two training samples have

    @property
    def learned(self) -> bool:
        """Whether the answers are better than one that needs neither picture nor question."""
        return self.score > self.majority

    @property
    def content_is_there(self) -> bool:
        """Whether the answers are better than that one but for their format."""
        return self.format_free is not None and self.format_free > self.majority

    def to_json(self) -> dict[str, Any]:
        """The scores as a JSON object."""
        return {**asdict(self), "learned": self.learned}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Learned:
        """The scores of `to_json`."""
        return cls(**{name: value for name, value in content.items() if name != "learned"})


def held_out_set(data: RunData, number: int) -> TestSet | None:
    """The held-out samples of a task as a set to score; None where the task holds none out."""
    part = data.validation[number]
    if not len(part[0]):
        return None
    samples = StageData([part])
    left_out = () if samples.used is None else np.setdiff1d(np.arange(len(samples)), samples.used).tolist()
    return replace(data.tests[number], data=samples, unanswered=frozenset(left_out))


def measure_learned(data: RunData, number: int, pool: PromptPool, evaluator: Evaluator) -> Learned | None:
    """The scores of the task that was learned last; None where it holds no samples out. All ranks call it together."""
    held_out = held_out_set(data, number)
    if held_out is None:
        return None
    score = evaluator.held_out(number, held_out, pool)

    def against() -> Learned:
        training = StageData([data.train[number]])
        pictured = held_out.data.keys.has_image.tolist()
        majority = majority_score(training, held_out.texts, held_out.metric, held_out.scoring, pictured)
        free = format_free_score(held_out_folder(evaluator.session.path, len(pool)), held_out)
        recurring = recurring_share(training, held_out.texts)
        return Learned(held_out.name, len(held_out.data), score, majority, free, len(training), recurring)

    return on_main(evaluator.session.world, against)


def may_get_heads(recipe: Recipe) -> bool:
    """Whether the run keeps no answer heads, and its finished stages could get some: see `adopt_heads`."""
    method = make_method(recipe.method)
    if not hasattr(method.options, "answer_head") or method.options.keeps_answer_heads:
        return False
    has_use = (method.routing.finds or method.needs_task) and recipe.evaluate.engine != "vllm"
    return has_use and kind_of(method).outcome is Part.outcome  # else a file has other values than were trained


def sentences(found: Learned | None, recipe: Recipe, losses: Sequence[float] = ()) -> list[str]:
    """What to say of a task that was not learned, and why that may be; nothing of one that was.

    Args:
        found: the task's scores; None where it holds no samples out.
        recipe: the run's recipe, in which the task is the last.
        losses: those that were logged of its stage, in the order of the steps.
    """
    task = recipe.data.tasks[-1].name
    if found is None:
        return [
            f"{task} holds no samples out (it has too few, or data.validation_share is 0), so whether it was learned "
            "is not known."
        ]
    if found.learned:
        return []
    causes = reasons(recipe, found.trained_on, found.format_free if found.content_is_there else None)
    if found.recurring >= MANY_RECUR and may_get_heads(recipe):
        causes.append(
            f"the decoder has to spell the answers, {found.recurring:.0f} percent of which several training samples "
            "have: an answer head names these without training "
            f"(`{command('run', recipe.run_path / CONFIG, '--set', 'method.answer_head=ridge')}`)"
        )
    causes.append(SMALL)
    fell = f" The stage's loss went from {losses[0]:.2f} to {losses[-1]:.2f}." if len(losses) > 1 else ""
    unsure = " So few samples say little; its test score says more." if found.samples < FEW_HELD_OUT else ""
    return [
        f"{task} was not learned: on its {found.samples} held-out samples its own module scores {found.score:.1f}, "
        f"and the most frequent training answer, given to all of them, {found.majority:.1f}.{unsure}{fell} It may be "
        f"because {'; or because '.join(causes)}."
    ]
