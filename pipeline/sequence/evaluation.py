"""The evaluations of a run: before the first stage, after each stage, and of the next task."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.config.recipe import Recipe
from pipeline.data.selection import Selection
from pipeline.methods import make_method
from pipeline.metrics.continual import routing_costs, routing_loss_per_task
from pipeline.planning.out_of_memory import out_of_memory_advice
from pipeline.prompts.generation import Conditions
from pipeline.prompts.parts.base import entry_of
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routing import Routed
from pipeline.ranks.world import on_main
from pipeline.runs.layout import after_folder, ahead_folder, held_out_folder, told_folder, zero_shot_folder
from pipeline.runs.session import Session
from pipeline.sequence.answers import AnswerKey, AnswerStore
from pipeline.sequence.evaluate import Answering, evaluate_task
from pipeline.sequence.models import Models
from pipeline.sequence.test_set import TestSet
from pipeline.sequence.told import ToldStore
from pipeline.sequence.vllm import server_of
from pipeline.tracking.tracker import NullTracker, Tracker
from pipeline.training.operations import OperationCount

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
        self.server = server_of(recipe, made_by["base_model"])
        self.seconds = 0.0  # spent on evaluation so far
        self.operations: dict[str, float] = {}  # by task: of an answer with modules, in the first batch of this call

    def zero_shot(self) -> list[float] | None:
        """Scores [T] of the frozen model alone; None where the recipe leaves them out."""
        if not self.recipe.evaluate.zero_shot and self.method.stages([test.name for test in self.tests]):
            return None
        folder = zero_shot_folder(self.session.path)
        row = [self._routed(number, PromptPool(), folder) for number in range(len(self.tests))]
        log.info("zero-shot: %s", _named(self.tests, row))
        self.tracker.metrics({f"zero_shot.{test.name}": s for test, s in zip(self.tests, row, strict=True)}, 0)
        return row

    def row(self, seen: int, stage: str, pool: PromptPool) -> list[float | None]:
        """Row [T] of the accuracy matrix after the stage of this name: the first `seen` tasks, None for the others."""
        self.session.watchdog.beat(f"routing after stage {stage}", slow=True)  # fits the router, on rank 0
        reused = range(1, seen) if self.recipe.evaluate.reuse else ()
        earlier = [after_folder(self.session.path, number) for number in reused]
        folder = after_folder(self.session.path, seen)
        row: list[float | None] = [self._routed(task, pool, folder, earlier) for task in range(seen)]
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
        self.session.watchdog.beat(f"routing {self.tests[task].name} ahead", slow=True)
        # A folder of its own: the folders after a stage have only tasks learned by then.
        score = self._routed(task, pool, ahead_folder(self.session.path, task + 1))
        name = self.tests[task].name
        log.info("%s before its own stage: %.1f", name, score)
        self.tracker.metrics({f"ahead.{name}": score}, task)
        return score

    def route(self, task: int, pool: PromptPool) -> Routed:
        """The modules selected for the test samples of a task, with the gate of this number of stages; on rank 0."""
        keys = self.tests[task].data.keys
        if not len(pool):
            return Routed(Selection.none(len(keys.text)), torch.zeros(len(keys.text), 0))
        routing = make_method(self.recipe.method.after(len(pool))).routing
        return routing.route(keys, pool.states, task, f"the test set of {self.tests[task].name}")

    def told(
        self, seen: int, pool: PromptPool, row: Sequence[float | None], measure: bool
    ) -> list[float | None] | None:
        """The row [T] of the matrix had every sample's task been told; None where nothing is routed by scores.

        Args:
            seen: tasks learned by then.
            pool: the prompt sets of the stages so far.
            row: the routed scores [T].
            measure: answer what is missing; else only scores that an earlier call has measured are read.
        """
        folder, world = told_folder(self.session.path, seen), self.session.world
        learned = [test.name for test in self.tests[:seen]]
        # A set that several tasks share has no task that could be told.
        if not make_method(self.recipe.method).routing.can_be_told or pool.names != learned:
            return None

        def measured() -> bool:
            if measure:  # the folder says so even where no task has a file in it, because nothing was misrouted
                folder.mkdir(parents=True, exist_ok=True)
            return folder.is_dir()

        if not on_main(world, measured):
            return None
        found = [self._told(task, pool, row[task], measure) for task in range(seen)]
        told = [*found, *[None] * (len(self.tests) - seen)]
        if measure:
            lost = routing_loss_per_task(told, row)
            log.info("after stage %d with the task told: %s", len(pool), _named(self.tests, told))
            numbers = dict(routing_costs(told[:seen], row[:seen]))
            for test, score, loss in zip(self.tests, told, lost, strict=True):
                numbers |= {f"told.{test.name}": score, f"routing_loss.{test.name}": loss}
            self.tracker.metrics(numbers, seen)
        return told

    def held_out(self, number: int, held_out: TestSet, pool: PromptPool) -> float:
        """The score on held-out samples of a task with the task told, by the rule of the run.

        Where nothing is routed by scores, the samples get the modules that the method gives the task.
        """
        seen, name = len(pool), held_out.name
        self.session.watchdog.beat(f"routing the held-out samples of {name}", slow=True)
        routing = make_method(self.recipe.method.after(seen)).routing
        told = routing.can_be_told and pool.names == [test.name for test in self.tests[:seen]]

        def route() -> Routed:
            keys = held_out.data.keys
            routed = routing.route(keys, pool.states, number, f"the held-out samples of {name}")
            if not told:
                return routed
            return replace(routed, selection=routing.told(routed, pool.states, number, keys.has_image))

        score = self._task(held_out, pool, route, self._store(held_out_folder(self.session.path, seen), pool))
        log.info("%s, held-out samples with the task told: %.1f", name, score)
        self.tracker.metrics({f"held_out.{name}": score}, number + 1)
        return score

    def _told(self, number: int, pool: PromptPool, score: float | None, measure: bool) -> float | None:
        """One task's score with the task told, `score` being the routed one; None where it is not measured yet."""
        self.session.stop_if_told("during evaluation")
        seen, path, world, test = len(pool), self.session.path, self.session.world, self.tests[number]
        routing = make_method(self.recipe.method.after(seen)).routing

        @functools.cache
        def both() -> tuple[Routed, Routed]:
            routed = self.route(number, pool)
            told = routing.told(routed, pool.states, number, test.data.keys.has_image)
            return routed, replace(routed, selection=told)

        def store() -> ToldStore:
            # In the order in which they are read: the routed answers, those after the task's own stage, then others.
            stages = [seen, number + 1, *range(seen - 1, number + 1, -1)] if self.recipe.evaluate.reuse else [seen]
            earlier = [folder(path, stage) for stage in dict.fromkeys(stages) for folder in (after_folder, told_folder)]
            plain = self._store(told_folder(path, seen), pool)
            return ToldStore(plain.folder, earlier, plain.key, lambda: both()[0].selection, after_folder(path, seen))

        def known() -> tuple[bool, float | None]:
            routed, told = both()
            if not bool(told.selection.differs(routed.selection).any()):
                store().remove(test.name)
                return True, score
            return not measure, None if measure else store().task(test, pool, told).finished_score()

        decided, found = on_main(world, known)
        return found if decided else self._task(test, pool, lambda: both()[1], store())

    def _routed(self, number: int, pool: PromptPool, folder: Path, earlier: Sequence[Path] = ()) -> float:
        """Score one task in percent as it is routed; predictions are written to `folder`."""
        return self._task(
            self.tests[number], pool, lambda: self.route(number, pool), self._store(folder, pool, earlier)
        )

    def _store(self, folder: Path, pool: PromptPool, earlier: Sequence[Path] = ()) -> AnswerStore:
        """The answers of an evaluation in `folder`; those in `earlier` may be reused."""
        router = self.method.routing.router
        made = (self.method.insertion, pool.shared_fingerprint(), self.made_by)
        label = "" if router is None or self.method.router in ("mean", "prototype") else router.label
        return AnswerStore(folder, earlier, AnswerKey(*made, label))

    def _task(self, test: TestSet, pool: PromptPool, route: Callable[[], Routed], store: AnswerStore) -> float:
        """Score one task in percent with the modules that `route` selects; predictions are written to the store."""
        session, recipe = self.session, self.recipe
        session.stop_if_told("during evaluation")
        began = time.perf_counter()
        conditions = Conditions(
            recipe.train.workers,
            go_on=lambda: not session.told_to_stop(),
            progress=session.watchdog.progress,
            count=self._count(test, pool),
        )
        answering = Answering(
            lambda: self.models.replica(pool),
            recipe.evaluate.batch,
            entry_of(self.method),
            recipe.evaluate.share_images,
            conditions,
            self.models.shards,
            self.server,
            recipe.evaluate.static_cache,
        )
        with out_of_memory_advice(recipe.evaluate):
            score = evaluate_task(test, pool, route, store, answering, session.world)
        if conditions.count is not None and conditions.count.per_sample is not None:
            self.operations[test.name] = conditions.count.per_sample
        self.seconds += time.perf_counter() - began
        return score

    def _count(self, test: TestSet, pool: PromptPool) -> OperationCount | None:
        """What counts the operations of a task's answers with modules, if the method has any; None: they are known."""
        uncounted = test.name not in self.operations and (len(pool) or self.method.part is None) and not self.server
        return OperationCount() if uncounted else None


def _named(tests: Sequence[TestSet], row: Sequence[Any]) -> str:
    return ", ".join(f"{t.name} {s:.1f}" for t, s in zip(tests, row, strict=True) if s is not None)
