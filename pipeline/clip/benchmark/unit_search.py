"""Searches the lengths of a unit's prompts before its training; units with equal settings and data share one search."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from pipeline.clip.benchmark.opened import OpenBenchmark
from pipeline.clip.images.ready_pixels import ReadyPixels, Room, decoding_threads
from pipeline.clip.learning.few_shot_batches import FewShotBatches, FewShotImages, micro_batches
from pipeline.clip.learning.protocol import epoch_rates
from pipeline.clip.learning.unit import Unit
from pipeline.clip.recipe import ClipTrainConfig
from pipeline.clip.search.choice import choose
from pipeline.clip.search.engine import Rates, SearchEngine
from pipeline.clip.search.validation import SearchImages, ValidationBatches, search_images
from pipeline.clip.search_space import search_space
from pipeline.files.atomic import empty_folder, remove_folder, write_json
from pipeline.ranks.world import on_main, together
from pipeline.runs.claim import check_stage
from pipeline.runs.layout import METRICS, RESUME, SEARCHES, unfinished
from pipeline.training.loop import Attempt, train_stage
from pipeline.training.resume import StepSaver, StepState, cut_log, newest, restore_random_state
from pipeline.training.schedule import LearningRate

log = logging.getLogger(__name__)
SEARCH = "search.json"
# Training settings that a search takes over; it has its own epochs, batch and rate.
TAKEN = ("momentum", "weight_decay", "warmup_epochs", "clip", "augment")


class UnitSearcher:
    """Finds the lengths of the units of a benchmark."""

    def __init__(self, opened: OpenBenchmark) -> None:
        self.recipe, self.session, self.models = opened.recipe, opened.session, opened.models
        self.data, self.files, self.tracker = opened.data, opened.files, opened.tracker

    def search(self, unit: Unit) -> dict[str, Any]:
        """The content of search.json: of the search with this unit's settings, which runs unless it is finished.

        Raises:
            UserError: there are no validation images, and too few training images to hold any out.
            DivergedError: a loss is not a finite number.
            Interrupted: a signal asked to stop.
        """
        world, settings = self.session.world, self._settings(unit)
        expected = together(lambda: self._expected(unit))
        folder = self._folder(unit, settings)
        found = on_main(world, lambda: _read(folder / SEARCH))
        if found is None:
            found = self._run(unit, settings, expected, folder)
        together(lambda: check_stage(folder, found, expected))
        shown = {tower: " ".join(map(str, lengths)) for tower, lengths in found["lengths"].items()}
        log.info("%s: prompts per block: text %s, image %s", unit.label, shown["text"], shown["vision"])
        return found

    def _expected(self, unit: Unit) -> dict[str, Any]:
        """The fingerprints of model, training and validation images that a search has to match."""
        data = self.data[unit.dataset.name]
        found = data.validation_images(unit.seed, unit.group)
        ids = [] if found is None or data.val is None else [data.val.ids[row] for row in found.rows]
        digest = hashlib.sha256(json.dumps([ids, found and found.labels]).encode()).hexdigest()
        return {**self.files.expected(unit), "validation_images": digest}

    def keep(self, unit: Unit, found: dict[str, Any]) -> None:
        """Write search.json into the folder of the unfinished unit, with which it is finished; rank 0 writes."""
        if self.session.world.main:
            work = unfinished(self.files.folder(unit))
            work.mkdir(parents=True, exist_ok=True)
            write_json(work / SEARCH, found)

    def _settings(self, unit: Unit) -> dict[str, Any]:
        """All that the search depends on besides data and model, whose fingerprints are compared when it is read."""
        assert unit.search is not None
        train = self.recipe.train_of(unit.method, unit.dataset.name)
        return {
            "search": unit.search.model_dump(mode="json", exclude={"like", "lengths", "tie"}),
            "tie": unit.search.tie,
            "train": train.model_dump(mode="json", include=set(TAKEN)),
            "template": unit.options(1)["template"],
            "dtype": self.recipe.model.dtype,
            "group": unit.group,
        }

    def _folder(self, unit: Unit, settings: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        return self.session.path / SEARCHES / f"{unit.dataset.name}-s{unit.seed}-{digest}"

    def _run(self, unit: Unit, settings: dict[str, Any], expected: dict[str, Any], folder: Path) -> dict[str, Any]:
        world, search, began = self.session.world, unit.search, time.perf_counter()
        assert search is not None
        train = self.recipe.train_of(unit.method, unit.dataset.name).model_copy(
            update={"epochs": search.epochs, "global_batch": search.global_batch, "lr": search.lr}
        )
        images = together(lambda: self._images(unit))
        batches = self._batches(unit, images, train)
        engine = self._engine(unit, images, train, batches)
        work, facts, start = unfinished(folder), {**expected, "world_size": world.size}, 0
        state = on_main(world, lambda: _begin(work, expected))
        if state is not None:
            start, facts["seconds"] = state.step, state.meta.get("seconds", 0.0)
            engine.resume(state.step, state.values, state.moments, state.rest)
            restore_random_state(state.random, world.rank, world.device)
        log.info(
            "%s: searching with %d training and %d validation images, %d steps%s",
            unit.label,
            len(images.train.rows),
            len(images.validation.rows),
            batches.steps,
            f", resuming after step {start}" if start else "",
        )
        rates = epoch_rates(search.lr, search.epochs, train.warmup_epochs)
        train_stage(
            engine,
            batches,
            train,
            LearningRate(search.lr, lambda step: rates[step // batches.steps_per_epoch] / search.lr),
            self.session,
            Attempt(work, StepSaver(engine, world, work, train, facts), start),
            lambda progress: self.tracker.metrics(
                {f"search.{name}": value for name, value in progress.numbers().items()}, progress.step
            ),
        )
        chosen = {
            tower: choose(alphas, getattr(search.options, tower), search.tie)
            for tower, alphas in engine.space.alphas.items()
        }
        found = {
            **expected,
            "settings": settings,
            "options": search.options.model_dump(mode="json"),
            "lengths": {tower: choice.lengths for tower, choice in chosen.items()},
            "gaps": {tower: choice.gaps for tower, choice in chosen.items()},
            "alphas": {tower: value.tolist() for tower, value in engine.rest().items()},
            "steps": batches.steps,
            "seconds": round(time.perf_counter() - began + facts.get("seconds", 0.0), 1),
            "validation": {"images": len(images.validation.rows), "held_out_of_training": images.held_out},
        }
        on_main(world, lambda: _finish(work, folder, found))
        return found

    def _images(self, unit: Unit) -> SearchImages:
        data, search = self.data[unit.dataset.name], unit.search
        assert search is not None
        own = data.validation_images(unit.seed, unit.group)
        images = search_images(unit.dataset.name, data.few_shots(unit.seed, unit.group), own, search.held_out)
        for note in images.notes:
            log.warning("%s: %s", unit.label, note)
        return images

    def _batches(self, unit: Unit, images: SearchImages, train: ClipTrainConfig) -> FewShotBatches:
        shards, world = self.data[unit.dataset.name].train, self.session.world
        assert shards is not None
        chosen = FewShotImages(shards, images.train, self.models.pixels, unit.seed, train.augment == "crop_flip")
        micro, accumulation = micro_batches(train.global_batch, train.micro_batch, world.size)
        return FewShotBatches(chosen, train, micro, accumulation, world.rank, world.size)

    def _engine(
        self, unit: Unit, images: SearchImages, train: ClipTrainConfig, batches: FewShotBatches
    ) -> SearchEngine:
        world, search, data = self.session.world, unit.search, self.data[unit.dataset.name]
        shards = data.train if images.held_out else data.val
        assert search is not None and shards is not None
        template = unit.options(1)["template"]
        space = search_space(self.models.backbone.sizes, search.options.towers, template, search.start, unit.seed)
        pixels = ReadyPixels(shards, self.models.pixels, Room.of(world), decoding_threads(world))
        validation = ValidationBatches(
            pixels, images.validation, search.validation_batch, unit.seed, world, search.validation == "first"
        )
        module = self.models.classifier(space, images.train.names)
        rates = Rates(train.lr, search.alpha_lr, train.momentum, train.weight_decay, train.clip)
        return SearchEngine(module, rates, validation, batches.accumulation, batches.steps_per_epoch)


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a finished search.json; None where there is none, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return found
    return None


def _begin(work: Path, expected: dict[str, Any]) -> StepState | None:
    """The newest checkpoint of an unfinished search; without one, None, and its folder is emptied."""
    found = newest(work)
    if found is None:
        empty_folder(work)
        return None
    check_stage(work, found.meta, expected)
    cut_log(work / METRICS, found.step)
    return found


def _finish(work: Path, folder: Path, found: dict[str, Any]) -> None:
    """Write search.json and give the folder its final name; only then is the search finished."""
    write_json(work / SEARCH, found)
    if folder.exists():  # with a search.json that cannot be read
        remove_folder(folder)
    work.rename(folder)
    shutil.rmtree(folder / RESUME, ignore_errors=True)  # last: until the rename, only the checkpoints can be resumed
