"""Writes the state of a run in progress: run.json, matrix.json, the report, and the tracker's metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipeline.adapter.registry import register_run
from pipeline.methods import Stage
from pipeline.metrics.continual import OTHER_NAMES, after_stage
from pipeline.prompts.pool import PromptPool
from pipeline.ranks.world import on_main
from pipeline.runs.folder import read_run
from pipeline.runs.layout import EVALUATIONS
from pipeline.sequence.confusion import routing_shares
from pipeline.sequence.costs import ANSWERING, Costs
from pipeline.sequence.evaluation import Evaluator
from pipeline.sequence.format_free import format_free_scores
from pipeline.sequence.majority import majority_scores
from pipeline.sequence.matrix import AccuracyMatrix
from pipeline.sequence.opened import OpenRun
from pipeline.sequence.verdict import lines_of
from pipeline.tracking.tracker import StoredRun, Tracker

log = logging.getLogger(__name__)


class RunRecord:
    """Writes run.json, matrix.json and the report of a run; all ranks call it, rank 0 writes.

    Args:
        run: the run, with the results of an earlier call.
        pool: the prompt sets of the finished stages; it grows during the run.
        evaluator: has the time spent on evaluations.
        tracker: receives the metrics of the matrix, and the report.
    """

    def __init__(self, run: OpenRun, pool: PromptPool, evaluator: Evaluator, tracker: Tracker) -> None:
        self.run, self.pool, self.evaluator, self.tracker = run, pool, evaluator, tracker
        self._main, self._results = run.session.world.main, run.results
        self._timing: dict[str, float] = {}
        self._majority: list[float] | None = None
        self.costs = Costs(self._results.state.get("costs") or {})

    # ------------------------------------------------------------------ run.json

    def begins(self, index: int, stage: Stage) -> None:
        """Record that the training of a stage starts, with its run in the tracker, which a restart then resumes."""
        if self._main:
            self._results.begins(index, max(stage.tasks))
        self.write_state("running")

    def trained(self, stage: Stage, seconds: float) -> None:
        """Record that a stage was trained and saved, and the time it took."""
        self._timing[f"train.{stage.name}_s"] = seconds
        self._results.trained()

    def finished(self, meta: Mapping[str, Any]) -> None:
        """Record a finished stage, of this call or of an earlier one, by its meta.json."""
        self.costs.stage(meta)

    def write_end(self, evaluated: bool) -> None:
        """Write the status at the end of a call: done, trained (the matrix is missing) or stopped (stages are)."""
        complete = len(self.pool) == len(self.run.stages)
        self.write_state("stopped" if not complete else "done" if evaluated else "trained")

    def write_state(self, status: str) -> None:
        """Write run.json with this status, see `RunResults.write_state`."""
        if not self._main:
            return
        if self.evaluator.seconds:
            self._timing["evaluate_s"] = round(self.evaluator.seconds, 1)
        if status != "running":
            self._timing["total_s"] = round(self._results.seconds(), 1)
        facts = {
            "recipe": self.run.recipe.name,
            "method": self.run.method.name,
            "changes_earlier": self.run.method.changes_earlier,
            "status": status,
            "seed": self.run.recipe.seed,
            "stage": len(self.pool),
            "stages": [stage.name for stage in self.run.stages],
            **self._results.common(self.run.session.world, self.tracker.run_ids()),
            "timing": self._results.times(self._timing),
            "skipped": self.run.data.skipped,
            "data": self.run.data.record,
            "needs_task": self.run.method.needs_task,
            "routes": self.run.method.routing.router is not None,
            "costs": {**self._costs(), ANSWERING: self.costs.by_task()},
            "left_out": self.run.data.left_out,
        }
        self._results.write_state(status, facts)

    def _costs(self) -> dict[str, float | None]:
        """The costs so far; every rank may ask, and rank 0 has counted."""
        for task, per_sample in self.evaluator.operations.items():
            self.costs.answered(task, per_sample)
        learned = sum(len(stage.tasks) for stage in self.run.stages[: len(self.pool)])
        return self.costs.content(self.pool, self.run.method, learned)

    # ------------------------------------------------------------------ matrix.json and the report

    def write_matrix(self, matrix: AccuracyMatrix, last: bool) -> dict[str, Any]:
        """Write matrix.json and send its metrics to the tracker; returns its content.

        `last`: this call has no further rows.
        """
        pool, tests, world = self.pool, self.run.data.tests, self.run.session.world
        routing = None
        method = self.run.method.routing
        if last and matrix.rows and len(pool) == len(tests) and method.router is not None:
            # On one rank, because some routers are fitted for each of their views.
            routing = on_main(world, lambda: routing_shares(tests, pool.states, method))
        if self._majority is None:  # computed late, because it reads the texts of all tasks
            folder = self.run.session.path / EVALUATIONS
            self._majority = on_main(world, lambda: majority_scores(folder, self.run.data.train, tests))
        path, zero_shot = self.run.session.path, matrix.zero_shot is not None
        free = on_main(world, lambda: format_free_scores(path, tests, matrix.rows, zero_shot))
        costs = self._costs()
        content = matrix.content(self.run.recipe.evaluate.ahead, self._majority, routing, format_free=free, costs=costs)
        on_main(world, lambda: self._results.write_matrix(content, last))
        numbers: dict[str, float | None] = dict(after_stage(matrix.rows, len(matrix.rows) - 1)) if matrix.rows else {}
        numbers = {name: value for name, value in numbers.items() if name not in OTHER_NAMES}
        for name, row in (routing.views if routing else {}).items():
            numbers[f"routing.{name}"] = sum(row) / len(row)
        if matrix.rows and None not in (scores := free["accuracy"][-1][: len(matrix.rows)]):
            numbers["format_free"] = sum(scores) / len(scores)
        numbers |= {f"cost.{name}": value for name, value in costs.items()}
        self.tracker.metrics(numbers, len(matrix.rows))
        return content

    def report(self) -> None:
        """Draw the report and send it to the tracker; a failure is a warning, because the results are complete."""
        if not self._main:
            return
        path = self.run.session.path
        try:
            from pipeline.report.page import write_report  # loads matplotlib, which may not be installed

            write_report(path, verdict=lines_of(read_run(path)))
        except Exception as error:
            log.warning("The report of %s could not be drawn (%s); the run itself is whole.", path, error)
            return
        self.tracker.results(path, self._register if self._is_to_be_registered() else None)

    def _is_to_be_registered(self) -> bool:
        """Whether the adapter may become a model version: all stages are finished, and there is at least one."""
        recipe, complete = self.run.recipe, len(self.pool) == len(self.run.stages)
        return complete and bool(recipe.tracking.registry) and bool(self.run.stages)

    def _register(self, stored: StoredRun) -> None:
        recipe = self.run.recipe
        method = recipe.method.name.replace(":", ".")  # of a target; MLflow takes no colon in the name of a model
        always = recipe.tracking.registry == "always"
        register_run(stored, self.run.session.path, f"{recipe.name}-{method}", recipe.seed, always)
