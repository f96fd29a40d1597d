"""A folder of recorded runs of DPL (layout: folder dpl/ of the fixtures) as our own classes; no size is known here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel

from pipeline.clip.learning.model import ImageBatch, PromptedCLIP
from pipeline.clip.methods import learner_of_sizes
from pipeline.clip.methods.base import PromptLearner
from pipeline.clip.search_space import SearchSpace, TowerOptions
from pipeline.clip.towers.backbone import Backbone
from pipeline.clip.towers.text import Words
from tests.clip.tiny import byte_tokenizer

TOWERS = {"img": "vision", "txt": "text"}


class Recorded:
    """The folder's backbone, batches, search and trainings."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text("utf-8"))
        self.inputs = load_file(folder / "inputs.safetensors")
        self.names: list[str] = self.meta["classnames"]
        self.choices: dict[str, Any] = json.loads((folder / "choices.json").read_text("utf-8"))

    def tensors(self, run: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{run}.safetensors")

    def batches(self, part: str) -> list[ImageBatch]:
        """The recorded batches of `train` or `val`, one per step."""
        pixels, labels = self.inputs[f"{part}_pixel_values"], self.inputs[f"{part}_labels"]
        return [ImageBatch(images, answers) for images, answers in zip(pixels, labels, strict=True)]

    def backbone(self, attention: str = "sdpa") -> Backbone:
        folder = self.folder / "clip_tiny"
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
        return Backbone(model)

    def words(self, shorten: bool = True) -> Words:
        return Words(byte_tokenizer(), self.meta["dims"]["context_length"], shorten)

    @property
    def options(self) -> TowerOptions:
        return TowerOptions(*(tuple(self.meta["options"][tower]) for tower in ("text", "vision")))

    @property
    def settings(self) -> dict[str, dict[str, float]]:
        """The numbers of both optimizers, from sentences such as "SGD lr 0.0035 momentum 0.9 weight_decay 5e-4"."""
        found = {}
        for field in ("optimizer", "alpha_optimizer"):
            words = self.meta[field].split()
            numbers: dict[str, float] = {}
            while words:
                word = words.pop(0)
                if words and _number(words[0]) is not None and _number(word) is None:
                    numbers[word] = float(words.pop(0))
            found[field] = numbers
        return found

    def search(self, backbone: Backbone, shorten: bool, chunk: int | None, plain: bool) -> PromptedCLIP:
        """Our search with the recorded initial values."""
        space = SearchSpace(backbone.sizes, self.options, self.meta["template"], plain=plain)
        space.load_state_dict(own_names(part(self.tensors("search"), "param.")))
        return PromptedCLIP(backbone, space, self.words(shorten), self.names, text_chunk=chunk)

    def training(self, run: str, backbone: Backbone, shorten: bool, chunk: int | None) -> PromptedCLIP:
        """Our classifier with the recorded lengths, texts and initial values."""
        options = {**self.meta["lengths"], "template": self.meta["template"]}
        options["texts"] = "ensemble" if run.endswith("ensemble") else "template"
        learner: PromptLearner = learner_of_sizes("dpl", backbone.sizes, **options)
        learner.load_state_dict(own_names(part(self.tensors(run), "param.")))
        return PromptedCLIP(backbone, learner, self.words(shorten), self.names, text_chunk=chunk)


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def own_names(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values by our names of the trainables: `ctx_img.0.2` is `ctx_vision.0_2`."""
    found = {}
    for name, value in values.items():
        kind, *places = name.split(".")
        stem, _, tower = kind.rpartition("_")
        found[".".join([f"{stem}_{TOWERS[tower]}", *(["_".join(places)] if places else [])])] = value
    return found


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
