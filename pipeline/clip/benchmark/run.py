"""A benchmark: every method on every dataset with every seed; a restart goes on at the step where it was."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.clip.benchmark.checkpoint import load_prompts, save_prompts, unfinished
from pipeline.clip.benchmark.evaluate import TestImages, evaluate_group
from pipeline.clip.benchmark.results import UnitResult, results_json
from pipeline.clip.benchmark.run_results import RESULTS, BenchmarkResults
from pipeline.clip.benchmark.tracking import benchmark_facts
from pipeline.clip.images.prepared import PreparedDataset
from pipeline.clip.images.ready_pixels import Room
from pipeline.clip.learning.averaging import EpochAveraging, WeightAverage
from pipeline.clip.learning.few_shot_batches import FewShotBatches, FewShotImages
from pipeline.clip.learning.models import ClipModels
from pipeline.clip.learning.protocol import epoch_rates, small_set_warning
from pipeline.clip.learning.unit import Unit, regularisers_of, units_of
from pipeline.clip.recipe import ClipRecipe, datasets_of
from pipeline.console.log import log_to_terminal
from pipeline.errors import Interrupted, require_extras
from pipeline.files.atomic import empty_folder, write_json
from pipeline.ranks.shutdown import StopFlag, stop_on_signals
from pipeline.ranks.watchdog import Watchdog, collective_timeout
from pipeline.ranks.world import World, agree, barrier, init_world, on_main, together
from pipeline.runs.claim import check_stage
from pipeline.runs.data_use import data_record
from pipeline.runs.lock import claimed
from pipeline.runs.provenance import package_versions
from pipeline.runs.session import Session
from pipeline.tracking.open import make_tracker
from pipeline.tracking.tracker import Tracker
from pipeline.training.loop import Attempt, train_stage
from pipeline.training.resume import StepSaver, StepState, cut_log, newest, restore_random_state
from pipeline.training.schedule import LearningRate

log = logging.getLogger("pipeline.clip")
RESULT = "result.json"


def run_benchmark(recipe: ClipRecipe, train: bool = True, evaluate: bool = True) -> dict[str, Any]:
    """Train and evaluate what is not done yet; returns the content of results.json and the run's folder.

    Raises UserError for wrong input, DivergedError for a loss that is not finite, Interrupted when a signal asked to
    stop.
    """
    require_extras("train", *recipe.tracking.extras)
    log_to_terminal()
    with stop_on_signals() as stop:
        limit_s = recipe.train.watchdog_s
        world = init_world(collective_timeout(limit_s))
        with Watchdog(world, limit_s).watching() as watchdog, claimed(recipe, world, stop) as path:
            return Benchmark(recipe, path, world, stop, watchdog).run(train, evaluate)


class Benchmark:
    """One run in progress."""

    def __init__(self, recipe: ClipRecipe, path: Path, world: World, stop: StopFlag, watchdog: Watchdog) -> None:
        """`path` is the run folder, claimed."""
        self.recipe, self.path, self.world, self.stop, self.watchdog = recipe, path, world, stop, watchdog
        self.units = units_of(recipe)
        names = [entry.name for entry, _ in datasets_of(recipe)]
        self.data = together(lambda: {n: PreparedDataset(Path(recipe.data.prepared) / n) for n in names})
        self.models = ClipModels(recipe, world, watchdog)
        pixels = self.models.pixels
        room = together(lambda: Room.of(world) if self.models.some_change_images(self.units) else None)
        batch = recipe.evaluate_batch
        self.tests = {n: TestImages(d.test, pixels, world, batch, room) for n, d in self.data.items()}
        self.tracker: Tracker
        self.results: list[UnitResult] = []
        self.files = on_main(world, lambda: BenchmarkResults(path, [unit.row for unit in self.units]))
        self.began = time.perf_counter()

    def run(self, train: bool = True, evaluate: bool = True) -> dict[str, Any]:
        """All units in order; see `run_benchmark`."""
        state = dict(self.files.state)
        self.tracker = together(lambda: make_tracker(benchmark_facts(self.recipe), self.path, self.world.rank))
        content: dict[str, Any] = {}
        missing = 0
        try:
            with self.tracker.sequence(state, self.files.stay_finished):
                for index, unit in enumerate(self.units):
                    self._write_state("running", index, state)
                    missing += not self._unit(index, unit, train, evaluate, state)
                    if evaluate:
                        content = self._write_results()
                if missing:
                    log.warning("%d of %d units not trained; `run` trains them.", missing, len(self.units))
                whole = not evaluate or self._whole(content)
                done = "stopped" if missing else "done" if evaluate else "trained"
                self._write_state(done, len(self.units) - missing, state)  # before the report, which says it
                if evaluate:
                    self._finish(content if whole else {})
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                self._write_state("stopped" if isinstance(error, Interrupted) else "failed", None, state)
            if isinstance(error, Interrupted):
                barrier()  # all ranks have heard of it; the first to leave may make a launcher end the others
            raise
        return {"run": str(self.path), "units": len(self.units) - missing, **content}

    # ------------------------------------------------------------------ one unit

    def _unit(self, index: int, unit: Unit, train: bool, evaluate: bool, state: dict[str, Any]) -> bool:
        """Train and evaluate a unit as far as it is not done; False when it still has to be trained."""
        self._stop_if_told(f"before unit {unit.label}")
        values = self._restore(unit) if unit.learns else {}
        result = self._read_result(unit) if values is not None else None
        if result is not None:
            log.info("%s: finished earlier", unit.label)
            self.results.append(result)
            return True
        if values is None and not train:
            return False
        if values is not None and not evaluate:
            return True
        with self.tracker.stage(index, unit.label):
            if values is None:
                self.files.trains(unit.row)
            self._write_state("running", index, state)  # with the unit's MLflow run, so that a restart continues it
            self.tracker.params({"method": unit.method.kind, "dataset": unit.dataset.name, "seed": unit.seed})
            if values is None:
                values = self._train(unit)
            if evaluate:
                self._evaluate(unit, values)
        return True

    def _stop_if_told(self, place: str) -> None:
        self.watchdog.beat(place, slow=True)
        if agree(self.stop.requested, self.world.device):
            raise Interrupted(f"Stopped by a signal {place}. Run the same command again to go on.")

    def _restore(self, unit: Unit) -> dict[str, Tensor] | None:
        folder = unit.folder(self.path)
        learned = on_main(self.world, lambda: load_prompts(folder))  # one rank's view of the disk counts
        if learned is None:
            return None
        expected = together(lambda: self._constants(unit))
        together(lambda: check_stage(folder, learned.meta, expected))
        return learned.values

    def _constants(self, unit: Unit) -> dict[str, Any]:
        """What a unit's checkpoint must agree with for its prompts to mean the same."""
        data = self.data[unit.dataset.name].identity(unit.seed, unit.group)
        return {"base_model": self.models.fingerprint, "data": data}

    def _begin(self, unit: Unit) -> StepState | None:
        """The newest checkpoint inside a unit that an earlier attempt did not finish, or an empty folder for it."""
        work = unfinished(unit.folder(self.path))
        found = newest(work)
        if found is None:
            empty_folder(work)
            return None
        check_stage(work, found.meta, self._constants(unit))
        cut_log(work / "metrics.jsonl", found.step)
        return found

    def _train(self, unit: Unit) -> dict[str, Tensor]:
        """Train one unit, save its prompts and return them."""
        recipe, world, models = self.recipe, self.world, self.models
        train = recipe.train_of(unit.method, unit.dataset.name)
        data, began = self.data[unit.dataset.name], time.perf_counter()
        assert data.train is not None
        group = together(lambda: data.few_shots(unit.seed, unit.group))
        warning = small_set_warning(len(group.rows), train.global_batch, train.epochs)
        if warning:
            log.warning("%s: %s", unit.label, warning)
        learner = models.learner(unit, len(group.names))
        engine = models.engine(unit, learner, group.names)
        images = FewShotImages(data.train, group, models.pixels, unit.seed, train.augment == "crop_flip")
        if train.cache_images and not images.augment and not learner.changes_images and not engine.module.regularisers:
            images.features = models.features(images, learner)
        batches = FewShotBatches(images, train, engine.micro_batch, engine.accumulation, world.rank, world.size)
        engine.module.learner.template = learner.template
        engine.module.regularisers = tuple(regularisers_of(unit.method, recipe.template_of(unit.dataset.name)))
        engine.module.set_classes(group.names, models.backbone)
        average = unit.method.average
        averaging = None
        if average:
            epoch = batches.steps_per_epoch * engine.accumulation
            averaging = EpochAveraging(WeightAverage(train.epochs, average.mean, average.deviation), epoch)
        values = {name: value.detach().clone() for name, value in learner.named_parameters()}
        engine.restart(values)
        engine.companion = averaging
        rates = epoch_rates(train.lr, train.epochs, train.warmup_epochs)
        facts, start = {**self._constants(unit), "world_size": world.size}, 0
        found = on_main(world, lambda: self._begin(unit))
        if found is not None:
            start, facts["seconds"] = found.step, found.meta.get("seconds", 0.0)
            engine.resume(found.values, found.step, found.moments)
            if averaging is not None:
                averaging.resume(found.rest, found.step * engine.accumulation)
            restore_random_state(found.random, world.rank, world.device)
        log.info(
            "%s: %d images of %d classes, %d steps%s",
            unit.label,
            len(images),
            len(group.names),
            batches.steps,
            f", going on after step {start}" if start else "",
        )
        folder = unit.folder(self.path)
        work = unfinished(folder)
        history = train_stage(
            engine,
            batches,
            train,
            LearningRate(train.lr, lambda step: rates[step // batches.steps_per_epoch] / train.lr),
            Session(self.path, world, self.stop, self.watchdog),
            Attempt(work, StepSaver(engine, world, work, train, facts), start),
            lambda progress: self.tracker.metrics(progress.numbers(), progress.step),
        )
        self.watchdog.beat(f"saving {unit.label}", slow=True)
        values = engine.values() if averaging is None else averaging.average.average()
        meta = {
            **facts,
            "seconds": round(time.perf_counter() - began + facts.get("seconds", 0.0), 1),
            "method": unit.method.kind,
            "options": unit.options(len(group.names)),
            "template": learner.template,
            "row": unit.method.name,
            "dataset": unit.dataset.name,
            "seed": unit.seed,
            "group": unit.group,
            "classes": list(group.names),
            "model": recipe.model.path,
            "images": len(images),
            "steps": batches.steps,
            "trained": sum(value.numel() for value in values.values()),
            "loss": history[-1].loss,
            "versions": package_versions(),
        }
        on_main(world, lambda: save_prompts(folder, values, meta))
        self.tracker.stage_model(folder, unit.label, {"loss": history[-1].loss})
        return values

    def _evaluate(self, unit: Unit, values: dict[str, Tensor]) -> None:
        """Score a unit on every group of its protocol and keep the counts."""
        data = self.data[unit.dataset.name]
        wanted = [(name, self.data[dataset], dataset, part) for name, dataset, part in unit.groups]
        groups = together(lambda: [(name, d.test_images(part), dataset) for name, d, dataset, part in wanted])
        learner = self.models.learner(unit, len(data.classes.names))
        learner.load_state_dict(values)
        module = self.models.classifier(learner, groups[0][1].names)
        counts, names = {}, {}
        for name, group, dataset in groups:
            self._stop_if_told(f"in the evaluation of {unit.label}")
            if unit.method.kind == "zero_shot" and "template" not in unit.method.options:
                learner.template = self.recipe.template_of(dataset)  # its words are the dataset's own
            counts[name], names[name] = evaluate_group(module, self.tests[dataset], group), group.names
        result = UnitResult(unit.method.name, unit.dataset.name, unit.seed, counts, names)
        self.results.append(result)
        named = {f"accuracy.{name}": 100 * found.accuracy for name, found in counts.items()}
        log.info("%s: %s", unit.label, ", ".join(f"{n.partition('.')[2]} {a:.1f}" for n, a in named.items()))
        self.tracker.metrics(named, 0)
        self.tracker.model_metrics(unit.label, named, 0)
        if self.world.main:
            write_json(unit.folder(self.path) / RESULT, result.to_json())

    # ------------------------------------------------------------------ results and state

    def _read_result(self, unit: Unit) -> UnitResult | None:
        def read() -> UnitResult | None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return UnitResult.from_json(json.loads((unit.folder(self.path) / RESULT).read_text("utf-8")))
            return None

        return on_main(self.world, read)

    def _write_results(self) -> dict[str, Any]:
        content = results_json(self.recipe.data.protocol, self.results)
        if self.world.main:
            self.files.write_results(content, self.results, last=False)
        return content

    def _whole(self, content: dict[str, Any]) -> bool:
        """Whether the results have all that results.json had; for rank 0, the others have nothing to tell."""
        return not self.world.main or self.files.write_results(content, self.results, last=True)

    def _finish(self, content: dict[str, Any]) -> None:
        """Tell the tracker the means and draw the report; a run is worth keeping even if its page cannot be drawn."""
        for line in content.get("lines", []):
            numbers = {f"{line['method']}.{line['dataset']}.{g}": s["mean"] for g, s in line["groups"].items()}
            if line["harmonic"] is not None:
                numbers[f"{line['method']}.{line['dataset']}.harmonic"] = line["harmonic"]
            if line["target_mean"] is not None:
                numbers[f"{line['method']}.{line['dataset']}.target_mean"] = line["target_mean"]["mean"]
            self.tracker.metrics(numbers, 0)
        if not self.world.main:
            return
        from pipeline.clip.benchmark.report import write_benchmark_report

        try:
            page = write_benchmark_report(self.path)
        except Exception as error:
            log.warning("The report of %s could not be drawn (%s); the run itself is whole.", self.path, error)
            return
        for path in (page, self.path / RESULTS):
            self.tracker.artifact(path)

    def _write_state(self, status: str, done: int | None, previous: dict[str, Any]) -> None:
        if not self.world.main:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        previous.setdefault("started", now)
        previous["done"] = previous.get("done", 0) if done is None else done
        seconds = self.files.seconds(time.perf_counter() - self.began)
        self.files.write_state(
            status,
            {
                "kind": "clip",
                "recipe": self.recipe.name,
                "status": status,
                "seeds": list(self.recipe.seeds),
                "units": [unit.label for unit in self.units],
                "units_done": previous["done"],
                "started": previous["started"],
                "updated": now,
                "world_size": self.world.size,
                "mlflow": self.tracker.run_ids(),
                "versions": package_versions(),
                "timing": {"total_s": seconds},
                "data": data_record(
                    (name, split, shards, None) for name, data in self.data.items() for split, shards in data.splits()
                ),
            },
        )
