"""Evaluates one unit: its accuracy on every group of classes of its protocol."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from pipeline.clip.benchmark.evaluate import TestImages, evaluate_group
from pipeline.clip.benchmark.opened import OpenBenchmark
from pipeline.clip.benchmark.results import UnitResult
from pipeline.clip.images.prepared import PreparedDataset
from pipeline.clip.images.ready_pixels import Room
from pipeline.clip.learning.models import ClipModels
from pipeline.clip.learning.unit import Unit, units_of, with_lengths_of
from pipeline.clip.recipe import ClipRecipe
from pipeline.ranks.world import World, together

log = logging.getLogger(__name__)


def open_test_images(
    recipe: ClipRecipe, world: World, models: ClipModels, data: Mapping[str, PreparedDataset]
) -> dict[str, TestImages]:
    """The test images of every dataset by name.

    Where some method has image prompts, decoded pixels are kept in memory as far as they fit, because every unit of
    that method reads them. Raises UserError for a method whose initial words have too few tokens for this model.
    """
    room = together(lambda: Room.of(world) if models.some_change_images(units_of(recipe)) else None)
    batch = recipe.evaluate_batch
    return {
        name: TestImages(found.test, models.pixels, world, batch, room)
        for name, found in data.items()
        if found.test is not None
    }


class UnitEvaluator:
    """Scores units on the test images of their datasets, `images` by name."""

    def __init__(self, opened: OpenBenchmark, images: Mapping[str, TestImages]) -> None:
        self.recipe, self.session, self.models = opened.recipe, opened.session, opened.models
        self.data, self.images, self.tracker = opened.data, images, opened.tracker

    def evaluate(self, unit: Unit, values: dict[str, Tensor]) -> UnitResult:
        """The result of a unit whose trained values are `values`; one without groups where there are no test images."""
        if not unit.groups:  # the dataset has no test images
            return UnitResult(unit.method.name, unit.dataset.name, unit.seed, {}, {})
        wanted = [(name, self.data[dataset], dataset, part) for name, dataset, part in unit.groups]
        groups = together(lambda: [(name, d.test_images(part), dataset) for name, d, dataset, part in wanted])
        unit = with_lengths_of(unit, values, self.models.backbone.sizes.blocks)
        learner = self.models.learner(unit, self.data[unit.dataset.name].classes.names)
        learner.load_state_dict(values)
        module = self.models.classifier(learner, groups[0][1].names, unit.descriptions)
        counts, names = {}, {}
        for name, group, dataset in groups:
            self.session.stop_if_told(f"in the evaluation of {unit.label}")
            if not unit.learns and "template" not in unit.method.options:
                learner.template = self.recipe.template_of(dataset)  # zero-shot: each dataset has its own template
            counts[name], names[name] = evaluate_group(module, self.images[dataset], group), group.names
        named = {f"accuracy.{name}": 100 * found.accuracy for name, found in counts.items()}
        log.info("%s: %s", unit.label, ", ".join(f"{n.partition('.')[2]} {a:.1f}" for n, a in named.items()))
        self.tracker.metrics(named, 0)
        self.tracker.model_metrics(unit.label, named, 0)
        return UnitResult(unit.method.name, unit.dataset.name, unit.seed, counts, names)
