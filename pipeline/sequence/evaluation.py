"""The evaluations of a run: before the first stage, after each stage, and of the next task."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.config.recipe import Recipe
from pipeline.data.selection import Selection
from pipeline.methods import make_method
from pipeline.planning.out_of_memory import out_of_memory_advice
from pipeline.prompts.generation import Conditions
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.pool import PromptPool
from pipeline.runs.layout import after_folder, ahead_folder, zero_shot_folder
from pipeline.runs.session import Session
from pipeline.sequence.answers import AnswerKey, AnswerStore, Routed
from pipeline.sequence.evaluate import Answering, evaluate_task
from pipeline.sequence.models import Models
from pipeline.sequence.test_set import TestSet
from pipeline.tracking.tracker import NullTracker, Tracker

log = logging.getLogger(__name__)


class Evaluator:
    """Scores the tasks of a run with the modules of the finished stages.

    Args:
        recipe: the run's recipe (sections method, evaluate and train).
        session: the run folder for the predictions, and the ranks.
        tests: the test sets in the order of the recipe's tasks.
        models: loads the model that answers.
        made_by: fingerprints of the base model and of its files by name, on which answers depend.
        tracker: receives the scores.
    """

    def __init__(
        self,
        recipe: Recipe,
        session: Session,
        tests: Sequence[TestSet],
        models: Models,
        made_by: Mapping[str, str],
        tracker: Tracker | None = None,
    ) -> None:
        self.recipe, self.session, self.tests, self.models, self.made_by = recipe, session, tests, models, made_by
        self.tracker = tracker or NullTracker()
        self.method = make_method(recipe.method)
        self.seconds = 0.0  # spent on evaluation so far

    def zero_shot(self) -> list[float] | None:
        """Scores [T] of the frozen model alone; None where the recipe leaves them out."""
        if not self.recipe.evaluate.zero_shot and self.method.stages([test.name for test in self.tests]):
            return None
        row = [
            self._task(number, PromptPool(), zero_shot_folder(self.session.path)) for number in range(len(self.tests))
        ]
        log.info("zero-shot: %s", _named(self.tests, row))
        self.tracker.metrics({f"zero_shot.{test.name}": s for test, s in zip(self.tests, row, strict=True)}, 0)
        return row

    def row(self, seen: int, stage: str, pool: PromptPool) -> list[float | None]:
        """Row [T] of the accuracy matrix after the stage of this name: the first `seen` tasks, None for the others."""
        reused = range(1, seen) if self.recipe.evaluate.reuse else ()
        earlier = [after_folder(self.session.path, number) for number in reused]
        folder = after_folder(self.session.path, seen)
        row: list[float | None] = [self._task(task, pool, folder, earlier) for task in range(seen)]
        row += [None] * (len(self.tests) - seen)
        log.info("after stage %d (%s): %s", len(pool), stage, _named(self.tests, row))
        named = {f"accuracy.{t.name}": s for t, s in zip(self.tests, row, strict=True) if s is not None}
        self.tracker.metrics(named, seen)
        self.tracker.model_metrics(stage, named, seen)
        return row

    def ahead(self, task: int, pool: PromptPool) -> float | None:
        """The score of the next task before its own stage; None for methods that need the task."""
        if not self.recipe.evaluate.ahead or self.method.needs_task:
            return None
        # A folder of its own: the folders after a stage have only tasks learned by then.
        score = self._task(task, pool, ahead_folder(self.session.path, task + 1))
        name = self.tests[task].name
        log.info("%s before its own stage: %.1f", name, score)
        self.tracker.metrics({f"ahead.{name}": score}, task)
        return score

    def route(self, task: int, pool: PromptPool) -> Routed:
        """The modules selected for the test samples of a task, with the gate of this number of stages."""
        keys = self.tests[task].data.keys
        if not len(pool):
            return Routed(Selection.none(len(keys.text)), torch.zeros(len(keys.text), 0))
        routing = make_method(self.recipe.method.after(len(pool))).routing
        scores = routing.scores(keys, pool.states)
        return Routed(routing.inference(scores, task, keys.has_image), routing.shown(scores))

    def _task(self, number: int, pool: PromptPool, folder: Path, earlier: Sequence[Path] = ()) -> float:
        """Score one task in percent; predictions are written to `folder`, and answers in `earlier` may be reused."""
        session, recipe = self.session, self.recipe
        session.stop_if_told("during evaluation")
        began = time.perf_counter()
        key = AnswerKey(self.method.insertion, pool.shared_fingerprint(), self.made_by)
        conditions = Conditions(
            recipe.train.workers, go_on=lambda: not session.told_to_stop(), progress=session.watchdog.progress
        )
        answering = Answering(
            lambda: self.models.replica(pool),
            recipe.evaluate.batch,
            entry_of(self.method),
            recipe.evaluate.share_images,
            conditions,
        )
        with out_of_memory_advice(recipe.evaluate):
            score = evaluate_task(
                self.tests[number],
                pool,
                lambda: self.route(number, pool),
                AnswerStore(folder, earlier, key),
                answering,
                session.world,
            )
        self.seconds += time.perf_counter() - began
        return score


def _named(tests: Sequence[TestSet], row: Sequence[Any]) -> str:
    return ", ".join(f"{t.name} {s:.1f}" for t, s in zip(tests, row, strict=True) if s is not None)
