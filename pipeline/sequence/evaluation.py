"""The evaluations of one run: which tasks are scored before the first stage and after each, with what and where to."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.config.recipe import Recipe
from pipeline.data.collate import StageData
from pipeline.errors import Interrupted
from pipeline.methods import Method, make_method
from pipeline.metrics.blind import majority_score
from pipeline.planning.out_of_memory import told_what_helps
from pipeline.prompts.generation import Conditions
from pipeline.prompts.pool import PromptPool, fingerprint_of
from pipeline.ranks.shutdown import StopFlag
from pipeline.ranks.world import agree, on_main
from pipeline.sequence.data import RunData
from pipeline.sequence.evaluate import AnswerSettings, Test, evaluate_task, task_similarity
from pipeline.sequence.models import Models
from pipeline.sequence.predictions import SCORES_VERSION, write_if_other
from pipeline.tracking.tracker import Tracker

log = logging.getLogger("pipeline.sequence.run")
MAJORITY_FILE = "majority.json"
Projector = dict[str, Tensor]  # the trained projector's values; empty: the base model's own


class RunEvaluation:
    """Scores the tasks of a run with the sets that there are."""

    def __init__(
        self,
        recipe: Recipe,
        path: Path,
        method: Method,
        data: RunData,
        models: Models,
        tracker: Tracker,
        stop: StopFlag,
        answering_model: dict[str, str],
    ) -> None:
        """`path` is the run folder; `answering_model` says which base model and model files give the answers."""
        self.recipe, self.path, self.method, self.models, self.tracker = recipe, path, method, models, tracker
        self.world, self.tests, self.train = models.world, data.tests, data.train
        self.stop, self.answering_model = stop, answering_model
        self.seconds = 0.0  # spent on evaluation so far
        self._majority: list[float] | None = None

    def zero_shot(self) -> list[float] | None:
        """Scores [T] of the frozen model alone; None where the recipe leaves them out."""
        if not self.recipe.evaluate.zero_shot and self.method.stages([test.name for test in self.tests]):
            return None
        folder = self.path / "eval" / "zero-shot"
        row = [self._task(number, PromptPool(), {}, folder, []) for number in range(len(self.tests))]
        log.info("zero-shot: %s", _named(self.tests, row))
        self.tracker.metrics({f"zero_shot.{test.name}": s for test, s in zip(self.tests, row, strict=True)}, 0)
        return row

    def majority(self) -> list[float]:
        """Scores [T] of each task's most frequent training answer, kept beside the predictions."""
        path = self.path / "eval" / MAJORITY_FILE

        def work() -> list[float]:
            known = _known_majority(path)
            row = []
            for part, test in zip(self.train, self.tests, strict=True):
                training = StageData([part])
                made_with = [training.fingerprint, len(training), test.data.fingerprint, len(test.data)]
                made_with += [test.metric, test.scoring, SCORES_VERSION]
                found = known.get(test.name)
                if found is None or found["made_with"] != made_with:
                    pictured = test.data.keys.has_image.tolist()
                    score = majority_score(training, test.texts, test.metric, test.scoring, pictured)
                    found = {"score": score, "made_with": made_with}
                row.append({"task": test.name, **found})
            write_if_other(path, json.dumps(row, indent=2, ensure_ascii=False) + "\n")
            return [float(found["score"]) for found in row]

        if self._majority is None:
            self._majority = on_main(self.world, work)
        return self._majority

    def after(self, seen: int, stage: str, pool: PromptPool, projector: Projector) -> list[float | None]:
        """Row of the accuracy matrix after the stage of this name: the first `seen` tasks, None for the others."""
        folder = self.path / "eval" / f"after-{seen:02d}"
        earlier = [self.path / "eval" / f"after-{number:02d}" for number in range(1, seen)]
        row: list[float | None] = [
            self._task(task, pool, projector, folder, earlier if self.recipe.evaluate.reuse else [])
            for task in range(seen)
        ]
        row += [None] * (len(self.tests) - seen)
        log.info("after stage %d (%s): %s", len(pool), stage, _named(self.tests, row))
        named = {f"accuracy.{t.name}": s for t, s in zip(self.tests, row, strict=True) if s is not None}
        self.tracker.metrics(named, seen)
        self.tracker.model_metrics(stage, named, seen)
        return row

    def ahead(self, task: int, pool: PromptPool, projector: Projector) -> float | None:
        """Score of the task that is learned next with what is there; None for a method that is told the task."""
        if not self.recipe.evaluate.ahead or self.method.needs_task:
            return None
        # Not among the answers after the stage: those are of tasks learned by then.
        score = self._task(task, pool, projector, self.path / "eval" / f"ahead-{task + 1:02d}", [])
        name = self.tests[task].name
        log.info("%s before its own stage: %.1f", name, score)
        self.tracker.metrics({f"ahead.{name}": score}, task)
        return score

    def _task(self, number: int, pool: PromptPool, projector: Projector, folder: Path, earlier: list[Path]) -> float:
        self.models.watchdog.beat("during evaluation", slow=True)
        if self._told_to_stop():
            raise Interrupted("Stopped by a signal during evaluation. Run the same command again to go on.")
        test, recipe = self.tests[number], self.recipe
        began = time.perf_counter()

        def route() -> tuple[Tensor, Tensor]:
            scores = task_similarity(test, pool, recipe.method.image_weight)
            if not len(pool):
                return torch.zeros(len(test.data), 0, dtype=torch.long), scores
            method = make_method(recipe.method.after(len(pool)))
            return method.answering_sets(pool, number, scores, test.data.keys.has_image), scores

        settings = AnswerSettings(
            recipe.evaluate.batch,
            recipe.method.insertion,
            fingerprint_of(projector),
            recipe.evaluate.share_images,
            self.answering_model,
        )
        progress = self.models.watchdog.progress
        conditions = Conditions(recipe.train.workers, go_on=lambda: not self._told_to_stop(), progress=progress)
        with told_what_helps(self.recipe, "evaluation"):
            result = evaluate_task(
                lambda: self.models.replica(projector),
                test,
                pool,
                route,
                self.world,
                [folder, *earlier],
                settings,
                conditions,
            )
        self.seconds += time.perf_counter() - began
        return result

    def _told_to_stop(self) -> bool:
        return agree(self.stop.requested, self.world.device)


def _named(tests: list[Test], row: Any) -> str:
    return ", ".join(f"{t.name} {s:.1f}" for t, s in zip(tests, row, strict=True) if s is not None)


def _known_majority(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier attempt computed, by task; nothing of a file that an earlier version wrote or that is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return {found["task"]: found for found in json.loads(path.read_text("utf-8"))}
    return {}
