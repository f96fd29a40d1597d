"""The check of what computes an image once, before what follows it: whether the model can go on from there."""

from __future__ import annotations

from pipeline.backbones.lmm_families import family_of, require_two_passes
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.planning.model_files import ModelFiles

AFTER_IMAGE = "after_image"


def passes_twice(recipe: Recipe) -> bool:
    """Whether a recipe's insertion, or its evaluation, computes images in a pass of their own."""
    try:
        return make_method(recipe.method).insertion == AFTER_IMAGE or recipe.evaluate.share_images
    except UserError:  # the check of the recipe says so
        return False


def check_insertion(recipe: Recipe, model: ModelFiles) -> str:
    """That the model's layers can continue from a prefix cache, in words; UserError where they cannot."""
    insertion = make_method(recipe.method).insertion
    try:
        built = model.built
    except (UserError, OSError, ValueError, KeyError, ImportError):
        return f"not checked: the configuration of '{recipe.model.path}' is not available here"
    family = family_of(model.planned.model_type)(built)
    require_two_passes(family, "" if insertion == AFTER_IMAGE else "evaluate.share_images: true")
    return f"{insertion}: a {family.kind} computes an image once and goes on from its keys and values"
