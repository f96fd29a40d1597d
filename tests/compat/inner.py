"""All contact of these tests with what is no documented entry point: the only file that follows the code's layout."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel

from pipeline.clip.benchmark.checkpoint import classifier_from
from pipeline.clip.recipe import load_benchmark
from pipeline.clip.towers.backbone import Backbone
from pipeline.config import registry
from pipeline.config.base import FileRecipe
from pipeline.config.kinds import recipe_kind
from pipeline.config.load import load_recipe
from pipeline.config.yaml_file import recipe_names

__all__ = ["CLIP_METHODS", "SEQUENCE_METHODS", "load_any", "logits_of", "recipe_names"]

SEQUENCE_METHODS = registry.names("methods")
CLIP_METHODS = registry.names("clip_methods")
NAMES = ("church", "red_panda", "parachute")


def load_any(name_or_path: str | Path) -> FileRecipe:
    """The resolved recipe, of a sequence or of a benchmark."""
    return load_benchmark(str(name_or_path)) if recipe_kind(name_or_path) == "clip" else load_recipe(name_or_path)


@torch.no_grad()
def logits_of(unit: Path, images: Tensor) -> Tensor:
    """What a benchmark's unit, on the working folder's CLIP, says of images [B, 3, 16, 16] among NAMES: [B, 3]."""
    backbone = Backbone(CLIPModel.from_pretrained("models/clip", dtype=torch.float32))
    words = backbone.words(AutoTokenizer.from_pretrained("models/clip"))
    return classifier_from(unit, backbone, words, NAMES).logits(images)
