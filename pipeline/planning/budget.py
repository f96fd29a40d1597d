"""A budget of trained values per stage: the largest rank or length of a method's module that keeps within it.

At equal budgets methods are compared, not their sizes. The budget is that of the module, which acts on answers. What
only routing learns, such as a projection head, and a trained image projector are told among a run's costs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from torch import nn

from pipeline.config.method import choice_name, method_options
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.methods import Method, make_method
from pipeline.planning.model_files import clip_key_width
from pipeline.planning.model_shape import meta_model, model_shape
from pipeline.prompts.parts.base import Part, kind_of
from pipeline.prompts.parts.shapes import DecoderShape

USUAL_KEY_WIDTH = 768  # of CLIP ViT-L, where the keys' configuration is not on this machine


def within_budget(recipe: Recipe, decoder: DecoderShape | None = None) -> Recipe:
    """The recipe with the size of its method's module that `train.budget` allows; as it is without a budget.

    The size is the module's option that its part names (`Part.sized_by`), or the method (`Method.sized_by`). A recipe
    that has been sized comes out the same again.

    Args:
        recipe: the recipe.
        decoder: the sizes of the model's decoder; None: read from the model's configuration.

    Raises:
        UserError: the budget is too small for one rank or one vector, or the module has no size to follow from it.
    """
    budget, method = recipe.train.budget, make_method(recipe.method)
    if budget is None or method.part is None:
        return recipe
    kind, shape = kind_of(method), decoder or decoder_of(recipe.model, recipe.keys)
    option = method.sized_by or kind.sized_by
    if not option:
        raise UserError(
            f"train.budget: the part {choice_name(method.part)} of the method {method.name} has no option of which its "
            "size follows; leave train.budget out, or choose another part."
        )
    step = kind.size_step(method)

    def resized(steps: int) -> Method:
        return _resized(method, kind, option, steps * step)

    def fitting(steps: int) -> bool:
        return _trained(kind, resized(steps), shape) <= budget

    if not fitting(1):
        least = _trained(kind, resized(1), shape)
        raise UserError(
            f"train.budget: found {budget:,} trained values per stage, and the method {method.name} has {least:,} on "
            f"this model with {option} {step}; expected at least so many."
        )
    fits, beyond = 1, 2
    # One more of a size is at least one more value, so the end is below the budget.
    while beyond <= budget and fitting(beyond):
        fits, beyond = beyond, 2 * beyond
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if fitting(middle) else (fits, middle)
    return recipe.model_copy(update={"method": resized(fits).options})


def trained_values(recipe: Recipe, decoder: DecoderShape | None = None) -> int:
    """Values of the module that a stage of this recipe trains."""
    method = make_method(recipe.method)
    return (
        _trained(kind_of(method), method, decoder or decoder_of(recipe.model, recipe.keys))
        if method.part is not None
        else 0
    )


@functools.cache
def decoder_of(model: ModelConfig, keys: KeysConfig) -> DecoderShape:
    """The sizes of a model's decoder and of the keys, from their configurations; no weights are read."""
    return sized_decoder(meta_model(model), keys)


def sized_decoder(model: nn.Module, keys: KeysConfig) -> DecoderShape:
    """The same of a model on the meta device."""
    return dataclasses.replace(model_shape(model).decoder, key_width=clip_key_width(keys) or USUAL_KEY_WIDTH)


def _trained(kind: type[Part], method: Method, shape: DecoderShape) -> int:
    return sum(kind.sizes(method, shape))


def _resized(method: Method, kind: type[Part], option: str, size: int) -> Method:
    """The method with another size of its module; options that belong to it keep their ratio."""
    before, fields = kind.options(method), method.options.model_dump(mode="json")
    now: dict[str, Any] = {option: size}
    old = getattr(before, option, None) or fields.get(option)
    for name in kind.keeps_ratio:
        now[name] = getattr(before, name) * size / old
    inside = type(method.options).model_fields
    for name, value in now.items():
        if name in inside:
            fields[name] = value
        else:  # an option beside the part's name
            part = fields.get("part")
            fields["part"] = {**({"name": part} if isinstance(part, str) else dict(part or {})), name: value}
    return make_method(method_options(fields))
