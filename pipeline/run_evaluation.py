"""The evaluations of one run: which tasks are scored before the first stage and after each, with what and where to."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.checkpoint import write_json
from pipeline.config import Recipe
from pipeline.data.collate import StageData
from pipeline.distributed import agree, on_main
from pipeline.errors import Interrupted
from pipeline.evaluate import Test, evaluate_task, task_similarity
from pipeline.methods import Method
from pipeline.metrics.blind import majority_score
from pipeline.models import Models
from pipeline.prompts.pool import PromptPool, fingerprint_of
from pipeline.run_data import RunData
from pipeline.stopping import StopFlag
from pipeline.tracking import Tracker

log = logging.getLogger("pipeline.sequence")
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
        path = self.path / "eval" / "majority.json"

        def work() -> list[float]:
            if not path.is_file():
                row = [
                    majority_score(StageData([part]), test.data, test.metric, test.scoring)
                    for part, test in zip(self.train, self.tests, strict=True)
                ]
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, row)
            return json.loads(path.read_text("utf-8"))

        return on_main(self.world, work)

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
        test, settings = self.tests[number], self.recipe.evaluate
        began = time.perf_counter()
        scores = task_similarity(test, pool, self.recipe.method.image_weight)
        if len(pool):
            selected = self.method.answering_sets(pool, number, scores, test.data.keys.has_image)
        else:
            selected = torch.zeros(len(test.data), 0, dtype=torch.long)
        result = evaluate_task(
            lambda: self.models.replica(projector), test, pool, selected, scores, self.world, folder,
            settings.batch, earlier, self.recipe.method.insertion, fingerprint_of(projector),
            settings.share_images, self.answering_model, self._told_to_stop,
        )  # fmt: skip
        self.seconds += time.perf_counter() - began
        return result

    def _told_to_stop(self) -> bool:
        return agree(self.stop.requested, self.world.device)


def _named(tests: list[Test], row: Any) -> str:
    return ", ".join(f"{t.name} {s:.1f}" for t, s in zip(tests, row, strict=True) if s is not None)
