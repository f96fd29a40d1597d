"""The embedded model in a version that vLLM loads, whose answers are compared with those of the own engine on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.config.paths import PROJECT
from tests import tiny_clip
from tests.adapters import Models

EMBEDDED = PROJECT / "data_prep" / "nano" / "checkpoints" / "llava"


def save_loadable(folder: Path) -> Models:
    """Write a copy of the embedded LLaVA that vLLM 0.32 loads, and a tiny CLIP.

    vLLM's Llama knows no other activation than SiLU, with which the copy's answers mean nothing; and it expects the
    names of a vision tower that published checkpoints have, which transformers 5 does not write.
    """
    llava = folder / "llava"
    shutil.copytree(EMBEDDED, llava)
    config = json.loads((llava / "config.json").read_text("utf-8"))
    config["text_config"]["hidden_act"] = "silu"
    (llava / "config.json").write_text(json.dumps(config), "utf-8")
    with safe_open(str(EMBEDDED / "model.safetensors"), framework="pt") as file:
        tensors = {_published(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    save_file(tensors, llava / "model.safetensors", metadata={"format": "pt"})
    return Models(llava, tiny_clip.save_clip(folder / "clip"), config["text_config"]["hidden_size"])


def _published(name: str) -> str:
    """A tensor's name as published checkpoints of LLaVA have it."""
    inside = name.removeprefix("vision_tower.")
    return name if inside == name else f"vision_tower.vision_model.{inside}"
