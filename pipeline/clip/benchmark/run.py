"""Runs a benchmark: every method on every dataset with every seed; a restart resumes at the saved step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.clip.benchmark.active_rounds import AskingUnit, Workshop
from pipeline.clip.benchmark.opened import OpenBenchmark
from pipeline.clip.benchmark.record import BenchmarkRecord
from pipeline.clip.benchmark.run_results import BenchmarkResults
from pipeline.clip.benchmark.tracking import benchmark_facts
from pipeline.clip.benchmark.unit_evaluator import UnitEvaluator, open_test_images
from pipeline.clip.benchmark.unit_files import UnitFiles
from pipeline.clip.benchmark.unit_trainer import UnitTrainer
from pipeline.clip.images.prepared import PreparedDataset
from pipeline.clip.learning.models import ClipModels
from pipeline.clip.learning.unit import units_of
from pipeline.clip.recipe import ClipRecipe, datasets_of
from pipeline.errors import require_extras
from pipeline.ranks.world import on_main, together
from pipeline.runs.session import session
from pipeline.tracking.open import make_tracker

log = logging.getLogger(__name__)


def run_benchmark(recipe: ClipRecipe, train: bool = True, evaluate: bool = True) -> dict[str, Any]:
    """Train and evaluate the units that are not finished; returns the content of results.json and the run's folder.

    Args:
        recipe: the benchmark's recipe; the state of its run folder determines whether the run starts or resumes.
        train: False evaluates the units that are trained and leaves out the others.
        evaluate: False only trains.

    Raises:
        UserError: wrong input.
        DivergedError: a loss is not a finite number.
        Interrupted: a signal asked to stop.
    """
    require_extras("train", *recipe.tracking.extras)
    with session(recipe, recipe.train.watchdog_s) as here:
        units, names = (
            together(lambda: units_of(recipe, described=True)),
            [entry.name for entry, _ in datasets_of(recipe)],
        )
        data = together(lambda: {name: PreparedDataset(Path(recipe.data.prepared) / name) for name in names})
        models = ClipModels(recipe, here.world, here.watchdog)
        images = open_test_images(recipe, here.world, models, data)
        files = UnitFiles(here, data, models.fingerprint)
        results = on_main(here.world, lambda: BenchmarkResults(here.path, [unit.row for unit in units]))
        tracker = together(lambda: make_tracker(benchmark_facts(recipe), here.path, here.world.rank))
        opened = OpenBenchmark(recipe, here, models, data, files, tracker)
        trainer, evaluator = UnitTrainer(opened), UnitEvaluator(opened, images)
        workshop = Workshop(here, models, files, tracker, trainer, evaluator)
        asking = together(
            lambda: {
                unit.row: AskingUnit(recipe, unit, data[unit.dataset.name], workshop)
                for unit in units
                if unit.method.asks
            }
        )
        record = BenchmarkRecord(recipe, here, results, units, data, tracker)
        content: dict[str, Any] = {}
        missing = 0
        with here.running(tracker.sequence(dict(results.state), results.stay_finished), record.write_state):
            for index, unit in enumerate(units):
                record.write_state("running", index)
                here.stop_if_told(f"before unit {unit.label}")
                values: dict[str, Tensor] | None = files.restore(unit) if unit.learns else {}
                result = files.result(unit) if values is not None else None
                if result is not None:
                    log.info("%s: finished earlier", unit.label)
                elif values is None and not train:
                    missing += 1
                elif values is None or evaluate:
                    with tracker.stage(index, unit.label):
                        if values is None:
                            results.trains(unit.row)
                        record.write_state("running", index)  # records the unit's MLflow run, which a restart resumes
                        facts = {"method": unit.method.kind, "dataset": unit.dataset.name, "seed": unit.seed}
                        tracker.params(facts)
                        asks = asking.get(unit.row)
                        if values is None:
                            values = trainer.train(unit) if asks is None else asks.train(evaluate)
                        if evaluate:
                            result = evaluator.evaluate(unit, values) if asks is None else asks.evaluate()
                            files.write_result(unit, result)
                if result is not None:
                    record.add(result)
                if evaluate:
                    content, _ = record.write_results()
            if missing:
                log.warning("%d of %d units not trained; `run` trains them.", missing, len(units))
            lines = _last_results(record) if evaluate else []
            status = "stopped" if missing else "done" if evaluate else "trained"
            record.write_state(status, len(units) - missing)  # before the report, which shows the status
            if evaluate:
                record.report(lines)
        return {"run": str(here.path), "units": len(units) - missing, **content}


def _last_results(record: BenchmarkRecord) -> list[dict[str, Any]]:
    """Write results.json for the last time; returns its lines, none where the file has rows of units left out here."""
    content, complete = record.write_results(last=True)
    return content["lines"] if complete else []
