"""Trains one unit, from its initial or resumed values to its finished folder."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pipeline.clip.benchmark.checkpoint import unfinished
from pipeline.clip.benchmark.opened import OpenBenchmark
from pipeline.clip.benchmark.unit_search import UnitSearcher
from pipeline.clip.images.prepared import ClassGroup
from pipeline.clip.learning.averaging import EpochAveraging, WeightAverage
from pipeline.clip.learning.few_shot_batches import FewShotBatches, FewShotImages
from pipeline.clip.learning.protocol import epoch_rates, small_set_warning
from pipeline.clip.learning.unit import Unit, regularisers_of
from pipeline.clip.methods import PromptLearner
from pipeline.clip.recipe import ClipTrainConfig
from pipeline.clip.search.choice import arrange
from pipeline.ranks.world import on_main, together
from pipeline.runs.provenance import package_versions
from pipeline.training.engine import Engine
from pipeline.training.loop import Attempt, train_stage
from pipeline.training.resume import StepSaver, restore_random_state
from pipeline.training.schedule import LearningRate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenUnit:
    """A unit with its few-shot images, its learner and the engine that trains it."""

    unit: Unit
    train: ClipTrainConfig
    group: ClassGroup  # the few-shot images and their classes
    learner: PromptLearner  # with its initial values
    engine: Engine  # shared with other datasets and seeds of the same method


class UnitTrainer:
    """Trains the units of a benchmark."""

    def __init__(self, opened: OpenBenchmark) -> None:
        self.recipe, self.session, self.models = opened.recipe, opened.session, opened.models
        self.data, self.files, self.tracker = opened.data, opened.files, opened.tracker
        self.searcher = UnitSearcher(opened)

    def train(self, unit: Unit) -> dict[str, Tensor]:
        """Train one unit, save its prompts and return them.

        Raises:
            DivergedError: a loss is not a finite number.
            Interrupted: a signal asked to stop.
        """
        world, began = self.session.world, time.perf_counter()
        found_lengths = None
        if unit.search is not None:
            found_lengths = self.searcher.search(unit)
            how = "found" if unit.method.search is None else unit.method.search.lengths
            unit = replace(unit, lengths=arrange(found_lengths["lengths"], how, unit.seed))
            if not any(any(lengths) for lengths in found_lengths["lengths"].values()):
                return self._save_nothing(unit, found_lengths)
        opened = self._open(unit)
        train, group, engine = opened.train, opened.group, opened.engine
        batches = self._batches(opened)
        averaging = self._start(opened, batches.steps_per_epoch)
        facts, start = {**self.files.expected(unit), "world_size": world.size}, 0
        found = on_main(world, lambda: self.files.begin(unit))
        if found is not None:
            start, facts["seconds"] = found.step, found.meta.get("seconds", 0.0)
            engine.resume(found.values, found.step, found.moments)
            if averaging is not None:
                averaging.resume(found.rest, found.step * engine.accumulation)
            restore_random_state(found.random, world.rank, world.device)
        log.info(
            "%s: %d images of %d classes, %d steps%s",
            unit.label,
            len(batches.images),
            len(group.names),
            batches.steps,
            f", resuming after step {start}" if start else "",
        )
        rates, work = epoch_rates(train.lr, train.epochs, train.warmup_epochs), unfinished(self.files.folder(unit))
        history = train_stage(
            engine,
            batches,
            train,
            LearningRate(train.lr, lambda step: rates[step // batches.steps_per_epoch] / train.lr),
            self.session,
            Attempt(work, StepSaver(engine, world, work, train, facts), start),
            lambda progress: self.tracker.metrics(progress.numbers(), unit.first_step + progress.step),
        )
        self.session.watchdog.beat(f"saving {unit.label}", slow=True)
        values = engine.values() if averaging is None else averaging.average.average()
        meta = {
            "world_size": world.size,
            "seconds": round(time.perf_counter() - began + facts.get("seconds", 0.0), 1),
            "method": unit.method.kind,
            "options": unit.options(unit.contexts(group.names)),
            "template": opened.learner.template,
            "row": unit.method.name,
            "dataset": unit.dataset.name,
            "seed": unit.seed,
            "group": unit.group,
            "classes": list(group.names),
            "model": self.recipe.model.path,
            "images": len(batches.images),
            "steps": batches.steps,
            "trained": sum(value.numel() for value in values.values()),
            "loss": history[-1].loss,
            "versions": package_versions(),
        }
        if unit.descriptions is not None:
            meta["described"] = unit.descriptions.to_json(group.names)
        if found_lengths is not None:
            self.searcher.keep(unit, found_lengths)
        folder = self.files.save(unit, values, meta)
        self.tracker.stage_model(folder, unit.label, {"loss": history[-1].loss})
        return values

    def _save_nothing(self, unit: Unit, search: dict[str, Any]) -> dict[str, Tensor]:
        """Finish a unit whose search chose no prompt in any block: it is zero-shot, and nothing is left to train."""
        log.warning("%s: the search chose no prompts in any block, so the unit is the frozen model.", unit.label)
        group = together(lambda: self.data[unit.dataset.name].few_shots(unit.seed, unit.group))
        meta = {
            "method": unit.method.kind,
            "options": unit.options(len(group.names)),
            "template": self.recipe.template_of(unit.dataset.name),
            "row": unit.method.name,
            "dataset": unit.dataset.name,
            "seed": unit.seed,
            "group": unit.group,
            "classes": list(group.names),
            "model": self.recipe.model.path,
            "trained": 0,
            "versions": package_versions(),
        }
        self.searcher.keep(unit, search)
        self.files.save(unit, {}, meta)
        return {}

    def _open(self, unit: Unit) -> OpenUnit:
        """Select the images of a unit and make its learner, both identical on every rank."""
        train, data = self.recipe.train_of(unit.method, unit.dataset.name), self.data[unit.dataset.name]
        group = together(lambda: unit.training_images(data))
        warning = small_set_warning(len(group.rows), train.global_batch, train.epochs)
        if warning:
            log.warning("%s: %s", unit.label, warning)
        learner = self.models.learner(unit, group.names)
        return OpenUnit(unit, train, group, learner, self.models.engine(unit, learner, group.names))

    def _batches(self, opened: OpenUnit) -> FewShotBatches:
        """The micro-batches of this rank; image features are computed once where neither prompts nor augmentation
        change them and no regulariser needs pixels."""
        unit, train, engine, world = opened.unit, opened.train, opened.engine, self.session.world
        shards = self.data[unit.dataset.name].train
        assert shards is not None
        images = FewShotImages(shards, opened.group, self.models.pixels, unit.seed, train.augment == "crop_flip")
        changed = images.augment or opened.learner.changes_images or engine.module.regularisers
        if train.cache_images and not changed:
            images.features = self.models.features(images, opened.learner)
        return FewShotBatches(images, train, engine.micro_batch, engine.accumulation, world.rank, world.size)

    def _start(self, opened: OpenUnit, steps_per_epoch: int) -> EpochAveraging | None:
        """Set up the engine for this unit: its classes, regularisers and initial values.

        Returns the weight averaging that the engine calls after each micro-batch; None where the method has none.
        """
        unit, learner, engine = opened.unit, opened.learner, opened.engine
        template = self.recipe.template_of(unit.dataset.name)
        engine.module.learner.template = learner.template
        engine.module.regularisers = tuple(regularisers_of(unit.method, learner, template))
        engine.module.descriptions = unit.descriptions
        engine.module.set_classes(opened.group.names, self.models.backbone)
        average = unit.method.average
        averaging = None
        if average:
            over = WeightAverage(opened.train.epochs, average.mean, average.deviation)
            averaging = EpochAveraging(over, steps_per_epoch * engine.accumulation)
        values = {name: value.detach().clone() for name, value in learner.named_parameters()}
        engine.restart(values)
        engine.companion = averaging
        return averaging
