"""The models of a benchmark: the frozen backbone, the engine that trains a method, and the evaluated classifier."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.backbones.base_model import fingerprint
from pipeline.clip.images.pixels import Pixels
from pipeline.clip.images.ready_pixels import ReadyPixels, Room, decoding_threads
from pipeline.clip.learning.descriptions import Descriptions
from pipeline.clip.learning.engine import clip_engine, shards_parameters
from pipeline.clip.learning.few_shot_batches import FewShotImages
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.learning.unit import Unit, learner_of, regularisers_of
from pipeline.clip.methods import PromptLearner
from pipeline.clip.recipe import ClipRecipe
from pipeline.clip.towers.backbone import backbone_folder, backbone_source, load_backbone
from pipeline.hub.snapshots import share
from pipeline.ranks.watchdog import Watchdog
from pipeline.ranks.world import World, on_main, together
from pipeline.runs.recorded import recorded_base_model
from pipeline.training.engine import Engine


class ClipModels:
    """A frozen backbone on every rank, and one engine at a time for the method that is trained.

    Every rank has an unsharded backbone, for evaluation and for features of the frozen model that are computed once.
    """

    def __init__(self, recipe: ClipRecipe, world: World, watchdog: Watchdog) -> None:
        self.recipe, self.world, model = recipe, world, recipe.model
        dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
        source = backbone_source(model.location, model.revision)
        share(world, [source], lambda: watchdog.beat("fetching", slow=True))
        backbone, tokenizer = together(lambda: load_backbone(model.location, model.revision, dtype))
        self.backbone = backbone.to(world.device)
        for tower in (backbone.model.text_model, backbone.model.vision_model):
            # Report each forward pass to the watchdog: an evaluation may take longer than its limit.
            tower.embeddings.register_forward_hook(lambda *_: watchdog.progress())
        self.words = self.backbone.words(tokenizer)
        self.pixels = together(lambda: Pixels(backbone_folder(model.location, model.revision)))
        recorded = recorded_base_model(recipe.run_path)
        self.fingerprint = on_main(world, lambda: fingerprint(source, recorded))
        self._engine: tuple[tuple[Any, ...], Engine] | None = None

    def learner(self, unit: Unit, names: Sequence[str]) -> PromptLearner:
        """A learner for these classes with its initial values, identical on every rank."""
        return together(lambda: learner_of(unit, self.backbone, self.words, unit.contexts(names)))

    def classifier(
        self, learner: PromptLearner, names: Sequence[str], descriptions: Descriptions | None = None
    ) -> PromptedCLIP:
        """The classifier of a learner over these classes, on this rank's device."""
        chunk, learner = self.recipe.model.text_chunk, learner.to(self.world.device)
        return PromptedCLIP(self.backbone, learner, self.words, names, text_chunk=chunk, descriptions=descriptions)

    def some_change_images(self, units: Sequence[Unit]) -> bool:
        """Whether some method has image prompts, so that its units need pixels instead of frozen image features."""
        firsts = {unit.method.name: unit for unit in units}
        return any(learner_of(unit, self.backbone, self.words, 1).changes_images for unit in firsts.values())

    def features(self, images: FewShotImages, learner: PromptLearner) -> Tensor:
        """Features [N, J] of the images from the frozen image tower, without prompts."""
        ready = ReadyPixels(images.shards, images.pixels, Room(0), decoding_threads(self.world))
        batches = ready.batches(images.group.rows, self.recipe.evaluate_batch, self.world.device)
        with torch.no_grad():
            return torch.cat([self.backbone.image(pixels, learner.schedule, {}).cpu() for pixels in batches])

    def engine(self, unit: Unit, learner: PromptLearner, names: Sequence[str]) -> Engine:
        """The engine of the unit's method; a new one where the shapes of the trainables or the optimizer differ."""
        recipe = self.recipe
        train = recipe.train_of(unit.method, unit.dataset.name)
        sizes = tuple((name, tuple(value.shape)) for name, value in learner.named_parameters())
        shapes = unit.method.name, sizes, train.model_dump_json(exclude={"epochs"})
        if self._engine is None or self._engine[0] != shapes:
            self._engine = None
            sharded = shards_parameters(train)
            module = PromptedCLIP(
                copy.deepcopy(self.backbone) if sharded else self.backbone,
                copy.deepcopy(learner),
                self.words,
                names,
                regularisers_of(unit.method, learner, recipe.template_of(unit.dataset.name)),
                recipe.model.text_chunk,
                unit.descriptions,
            )
            self._engine = shapes, clip_engine(module, train, recipe.model.dtype, self.world)
        return self._engine[1]
