"""The check of the switches for speed: what the model and this machine have in the way of them."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.backbones.compiled import require_compiler, tower_layers
from pipeline.backbones.lmm import LMM
from pipeline.backbones.packing import require_packing
from pipeline.backbones.static_decoding import require_static
from pipeline.check.device import Device
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.planning.model_files import ModelFiles

TITLE = "speed"


def chosen(recipe: Recipe) -> dict[str, Any]:
    """The switches that a recipe sets, by the names of their fields."""
    train, model = recipe.train, recipe.model
    fields = {
        "train.compile": train.compile if train.compile != "none" else None,
        "train.packing": train.packing if train.packing != "none" else None,
        "train.copy_ahead": train.copy_ahead or None,
        "model.tf32": model.tf32 or None,
        "evaluate.static_cache": recipe.evaluate.static_cache or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def check_switches(recipe: Recipe, model: ModelFiles, device: Device) -> str:
    """The switches in words, and that model and machine can have them; UserError where they cannot.

    `device` is what the run will compute on, which may not be here; its compiler is looked for only where it is.
    """
    listed = ", ".join(f"{name} {str(value).lower()}" for name, value in chosen(recipe).items())
    gpu = device.memory is not None
    if recipe.train.compile != "none" and not device.asked:
        require_compiler(torch.device("cuda" if gpu else "cpu"))
    note = "" if gpu else "; copying ahead, TF32 and graphs do nothing on CPUs"
    try:
        built = model.built
    except (UserError, OSError, ValueError, KeyError, ImportError):
        return f"{listed}; not compared with the model, whose configuration is not available here"
    lmm = LMM(built, None)
    if recipe.train.compile == "decoder_and_tower":
        tower_layers(lmm)
    if recipe.train.packing != "none":
        require_packing(lmm)
    if recipe.evaluate.static_cache:
        require_static(lmm)
    return listed + note
