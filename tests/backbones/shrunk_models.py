"""Tiny random checkpoints that stand for the real models of the shipped recipes, and the Hub's cache that holds them.

They have the model's architecture, the fields of its config.json that ship with the project but for widths, layers and
vocabulary, its processor with the real image settings, and its files' names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.hub.known_models import known_settings
from tests import tiny
from tests.backbones.real_processors import with_real_settings
from tests.backbones.tiny_families import FAMILIES

COMMIT = "c" * 40
# Whose image settings are shipped: SmolVLM's checkpoints are of type idefics3.
IMAGES = {"idefics3": "smolvlm", "qwen2_5_vl": "qwen2_5_vl"}
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "depth",
    "num_heads",
    "out_hidden_size",
    "fullatt_block_indexes",
    "projection_dim",
    "rope_parameters",  # its sections add up to half a head
)


def save_shrunk(folder: Path, repository: str) -> Path:
    """Write a tiny checkpoint with the shipped settings of a repository; its tokenizer knows bytes."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    shipped = known_settings(repository)
    assert shipped is not None
    kind = shipped["model_type"]
    FAMILIES[kind](folder)
    small = json.loads((folder / "config.json").read_text("utf-8"))
    for section in ("text_config", "vision_config"):
        small[section] |= {name: value for name, value in shipped[section].items() if name not in WIDTHS}
    numbers = {name for name in shipped if name.endswith(("_id", "_index"))}  # of tokens, which the tokenizer has
    small |= {name: value for name, value in shipped.items() if name not in ("text_config", "vision_config", *numbers)}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**{**small, "dtype": "float32"}))
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "lm_head" in name:
                torch.nn.init.normal_(parameter, std=0.15)  # answers that differ
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)
    if kind == "llava":
        tiny.save_processor(folder, shipped["vision_config"]["image_size"], shipped["vision_config"]["patch_size"])
    else:
        with_real_settings(folder, IMAGES[kind])
    template = folder / "chat_template.jinja"  # the name of these models' file is an older one
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text("utf-8")}), "utf-8")
    template.unlink()
    return folder


def as_cached(cache: Path, repository: str, folder: Path) -> Path:
    """Copy a checkpoint into the Hub's cache, as a download of the repository leaves it; returns the snapshot."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    return snapshot
