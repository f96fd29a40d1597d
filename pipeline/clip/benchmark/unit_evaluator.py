"""Evaluates one unit: its accuracy on every group of classes of its protocol."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from pipeline.clip.benchmark.evaluate import TestImages, evaluate_group
from pipeline.clip.benchmark.results import UnitResult
from pipeline.clip.images.prepared import PreparedDataset
from pipeline.clip.images.ready_pixels import Room
from pipeline.clip.learning.models import ClipModels
from pipeline.clip.learning.unit import Unit, units_of
from pipeline.clip.recipe import ClipRecipe
from pipeline.ranks.world import World, together
from pipeline.runs.session import Session
from pipeline.tracking.tracker import Tracker

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
    return {name: TestImages(found.test, models.pixels, world, batch, room) for name, found in data.items()}


class UnitEvaluator:
    """Scores units on the test images of their datasets.

    Args:
        recipe: the benchmark's recipe.
        session: the ranks, over which the images are split.
        models: makes the classifier of a unit.
        data: the prepared datasets by name.
        images: their test images by name.
        tracker: receives the accuracies.
    """

    def __init__(
        self,
        recipe: ClipRecipe,
        session: Session,
        models: ClipModels,
        data: Mapping[str, PreparedDataset],
        images: Mapping[str, TestImages],
        tracker: Tracker,
    ) -> None:
        self.recipe, self.session, self.models = recipe, session, models
        self.data, self.images, self.tracker = data, images, tracker

    def evaluate(self, unit: Unit, values: dict[str, Tensor]) -> UnitResult:
        """The result of a unit whose trained values are `values`."""
        wanted = [(name, self.data[dataset], dataset, part) for name, dataset, part in unit.groups]
        groups = together(lambda: [(name, d.test_images(part), dataset) for name, d, dataset, part in wanted])
        learner = self.models.learner(unit, len(self.data[unit.dataset.name].classes.names))
        learner.load_state_dict(values)
        module = self.models.classifier(learner, groups[0][1].names)
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
