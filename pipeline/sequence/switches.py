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
    """Raise UserError where a recipe's method or weights cannot be combined with train.compile or train.packing.

    What depends on the model and its device is refused when it is loaded: `compiled_for`, and `require_packing`.
    """
    train, method = recipe.train, make_method(recipe.method)
    compiled, packed = f"train.compile {train.compile}", f"train.packing {train.packing}"
    asked = [what for what, value in ((compiled, train.compile), (packed, train.packing)) if value != "none"]
    for what in asked:
        field = what.split()[0]
        if entry_of(method).attaches:
            raise UserError(
                f"{what} is not possible with the method {method.name}, whose modules act inside the decoder's layers "
                "on whole rows of the batch; expected a method whose modules stand at the input, such as modalprompt. "
                f"Set {field} to none, or choose another method."
            )
        if method.insertion == "after_image":
            raise UserError(
                f"{what} is not possible with method.insertion after_image, which computes a sample in two passes; set "
                f"{field} to none, or method.insertion to after_bos."
            )
    if train.compile != "none" and recipe.model.quantization != "none":
        raise UserError(
            f"{compiled} is not possible with model.quantization {recipe.model.quantization}, whose products torch "
            "cannot compile; set one of them to none."
        )


def compiled_for(lmm: LMM, train: TrainConfig, device: torch.device) -> Compiled | None:
    """The layers that a recipe's train.compile compiles on a device; UserError where that is not possible."""
    if train.compile == "none":
        return None
    require_compiler(device)
    return Compiled(lmm, tower=train.compile == "decoder_and_tower")
