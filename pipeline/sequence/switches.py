"""The switches for speed of a recipe: what cannot be combined with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pipeline.backbones.compiled import Compiled, require_compiler
from pipeline.config.recipe import Recipe
from pipeline.config.train import TrainConfig
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.prompts.parts.base import entry_of

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM


def require_switches(recipe: Recipe) -> None:
    """Raise UserError where a recipe's method, weights or engine cannot be combined with its switches.

    What depends on the model and its device is refused when it is loaded: `compiled_for`, `require_packing` and
    `require_static`.
    """
    train, method, static = recipe.train, make_method(recipe.method), recipe.evaluate.static_cache
    asked = {"train.compile": train.compile, "train.packing": train.packing}
    off = {name: "none" for name, value in asked.items() if value != "none"}
    for field, none in {**off, **({"evaluate.static_cache": "false"} if static else {})}.items():
        what = f"{field} {asked.get(field, 'true')}"
        if entry_of(method).attaches:
            raise UserError(
                f"{what} is not possible with the method {method.name}, whose modules act inside the decoder's layers "
                "on whole rows of the batch; expected a method whose modules stand at the input, such as modalprompt. "
                f"Set {field} to {none}, or choose another method."
            )
        if method.insertion == "after_image" and field in off:
            raise UserError(
                f"{what} is not possible with method.insertion after_image, which computes a sample in two passes; set "
                f"{field} to none, or method.insertion to after_bos."
            )
    if train.compile != "none" and recipe.model.quantization != "none":
        raise UserError(
            f"train.compile {train.compile} is not possible with model.quantization {recipe.model.quantization}, whose "
            "products torch cannot compile; set one of them to none."
        )
    if static and recipe.evaluate.engine != "replicas":
        raise UserError(
            f"evaluate.static_cache true is not possible with evaluate.engine {recipe.evaluate.engine}, which does not "
            "decode on one rank; set static_cache to false, or engine to replicas."
        )


def compiled_for(lmm: LMM, train: TrainConfig, device: torch.device) -> Compiled | None:
    """The layers that a recipe's train.compile compiles on a device; UserError where that is not possible."""
    if train.compile == "none":
        return None
    require_compiler(device)
    return Compiled(lmm, tower=train.compile == "decoder_and_tower")
