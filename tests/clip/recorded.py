"""A folder of recorded reference runs (layout: folder clip_prompts/ of the fixtures) as our own classes.

Nothing here knows a size: method, lengths and depth come from a run's name, everything else from the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel

from pipeline.clip.learning.model import ImageBatch, PromptedCLIP
from pipeline.clip.methods import learner_of_sizes
from pipeline.clip.towers.backbone import Backbone
from pipeline.clip.towers.text import Words
from tests.clip.tiny import byte_tokenizer

NAMES = {
    "coop": r"coop_(?P<context>unified|csc)(?P<length>\d+)_(?P<position>end|middle|front)",
    "cocoop": r"cocoop(?P<length>\d+)",
    "maple": r"maple_ctx(?P<length>\d+)_depth(?P<depth>\d+)",
    "mpl": r"mpl_ctx(?P<length>\d+)_add(?P<add>\d+)_rm(?P<remove>\d+)_depth(?P<depth>\d+)",
}


class Run:
    """One recorded run: `method`, `options` and the recorded tensors by kind."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.tensors = load_file(path)
        for method, pattern in NAMES.items():
            match = re.fullmatch(pattern, self.name)
            if match:
                self.method = method
                self.options: dict[str, Any] = {k: int(v) if v.isdigit() else v for k, v in match.groupdict().items()}
                return
        raise AssertionError(f"{path} is no run of a known method: {', '.join(NAMES)}")

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}


class Recorded:
    """One folder: its backbone, images, classes and runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text("utf-8"))
        inputs = load_file(folder / "inputs.safetensors")
        self.pixels = inputs["pixel_values"]
        self.batch = ImageBatch(self.pixels, inputs["labels"])
        self.names: list[str] = self.meta["classnames"]

    def runs(self) -> Iterator[Run]:
        found = sorted(set(self.folder.glob("*.safetensors")) - {self.folder / "inputs.safetensors"})
        assert found, f"{self.folder} holds no recorded run"
        return map(Run, found)

    def backbone(self) -> Backbone:
        return Backbone(CLIPModel.from_pretrained(self.folder / "clip_tiny", dtype=torch.float32))

    def module(self, run: Run, backbone: Backbone, shorten: bool = True, chunk: int | None = None) -> PromptedCLIP:
        """Our classifier with the trainables the run started from."""
        options = dict(run.options)
        if options.pop("context", None) == "csc":
            options["classes"] = len(self.names)
        if run.method == "cocoop":
            options["words"] = None
        words = Words(byte_tokenizer(), self.meta["dims"]["context_length"], shorten)
        learner = learner_of_sizes(run.method, backbone.sizes, **options)
        learner.load_state_dict(run.part("param."))
        return PromptedCLIP(backbone, learner, words, self.names, text_chunk=chunk)

    def optimizer(self, module: PromptedCLIP) -> torch.optim.SGD:
        """The recorded optimizer, from a sentence such as "SGD lr 0.0035 momentum 0.9 weight_decay 5e-4"."""
        kind, *rest = self.meta["optimizer"].split()
        assert kind == "SGD", f"the recorded optimizer is {kind}"
        settings: dict[str, Any] = {name: float(value) for name, value in zip(rest[::2], rest[1::2], strict=True)}
        return torch.optim.SGD(module.learner.parameters(), **settings)
