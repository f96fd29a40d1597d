"""Writes the state of a benchmark in progress: run.json, results.json, the report, and the tracker's metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.clip.benchmark.results import UnitResult, results_json
from pipeline.clip.benchmark.run_results import BenchmarkResults
from pipeline.clip.images.prepared import PreparedDataset
from pipeline.clip.learning.unit import Unit
from pipeline.clip.recipe import ClipRecipe
from pipeline.runs.data_use import data_record
from pipeline.runs.layout import RESULTS
from pipeline.runs.session import Session
from pipeline.tracking.tracker import Tracker

log = logging.getLogger(__name__)


class BenchmarkRecord:
    """Writes run.json, results.json and the report of a benchmark; all ranks call it, rank 0 writes.

    Args:
        recipe: the benchmark's recipe.
        session: the run folder and the ranks.
        files: run.json and results.json, with what an earlier call wrote.
        units: all units of the benchmark.
        data: the prepared datasets by name; run.json records which were used.
        tracker: receives the means and the report.
    """

    def __init__(
        self,
        recipe: ClipRecipe,
        session: Session,
        files: BenchmarkResults,
        units: Sequence[Unit],
        data: Mapping[str, PreparedDataset],
        tracker: Tracker,
    ) -> None:
        self.recipe, self.session, self.files = recipe, session, files
        self.units, self.data, self.tracker = units, data, tracker
        self.results: list[UnitResult] = []  # of the units evaluated so far
        self.done = 0  # number of units that this call has processed

    def add(self, result: UnitResult) -> None:
        """Append the result of one unit."""
        self.results.append(result)

    def write_state(self, status: str, done: int | None = None) -> None:
        """Write run.json with this status (see `BenchmarkResults.write_state`) and `done` units (None: unchanged)."""
        if not self.session.world.main:
            return
        self.done = self.done if done is None else done
        facts = {
            "kind": "clip",
            "recipe": self.recipe.name,
            "status": status,
            "seeds": list(self.recipe.seeds),
            "units": [unit.label for unit in self.units],
            "units_done": self.done,
            **self.files.common(self.session.world, self.tracker.run_ids()),
            "timing": self.files.times({"total_s": self.files.seconds()}),
            "data": data_record(
                (name, split, shards, None) for name, data in self.data.items() for split, shards in data.splits()
            ),
        }
        self.files.write_state(status, facts)

    def write_results(self, last: bool = False) -> tuple[dict[str, Any], bool]:
        """Write results.json; returns its content and, on rank 0, whether it has every row of an earlier call.

        `last`: this call has no further results.
        """
        content = results_json(self.recipe.data.protocol, self.results)
        return content, not self.session.world.main or self.files.write_results(content, self.results, last)

    def report(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Send the means of these lines to the tracker and draw the report.

        A failure to draw the page is a warning: the results themselves are complete.
        """
        for line in lines:
            name = f"{line['method']}.{line['dataset']}"
            numbers = {f"{name}.{group}": spread["mean"] for group, spread in line["groups"].items()}
            if line["harmonic"] is not None:
                numbers[f"{name}.harmonic"] = line["harmonic"]
            if line["target_mean"] is not None:
                numbers[f"{name}.target_mean"] = line["target_mean"]["mean"]
            if line.get("area") is not None:
                numbers[f"{name}.area"] = line["area"]["mean"]
            self.tracker.metrics(numbers, 0)
        if not self.session.world.main:
            return
        from pipeline.clip.benchmark.report import write_benchmark_report  # matplotlib, which only rank 0 draws with

        path = self.session.path
        try:
            page = write_benchmark_report(path)
        except Exception as error:
            log.warning("The report of %s could not be drawn (%s); the run itself is whole.", path, error)
            return
        for file in (page, path / RESULTS):
            self.tracker.artifact(file)
