"""The check of a benchmark's searches: whether every dataset has images to validate on, and for which classes."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.clip.images.classes import Group, LabelledImage, Splits, group_of_classes
from pipeline.clip.images.few_shot import few_shot
from pipeline.clip.images.prepared import ClassGroup, PreparedDataset
from pipeline.clip.recipe import ClipRecipe
from pipeline.clip.search.validation import SearchImages, search_images
from pipeline.errors import UserError


def check_searches(recipe: ClipRecipe, dataset: str, found: Splits | PreparedDataset) -> tuple[list[str], list[str]]:
    """(problems, warnings) of the searches on one dataset, whose splits are read or which is prepared.

    Every seed draws as many images of a class, so the first stands for all.
    """
    problems: dict[str, None] = {}
    warnings: dict[str, None] = {}
    for most in sorted({search.held_out for row in recipe.methods if (search := recipe.search_of(row)) is not None}):
        try:
            warnings |= dict.fromkeys(_images(recipe, dataset, found, most).notes)
        except UserError as error:
            problems[str(error)] = None
    return list(problems), list(warnings)


def _images(recipe: ClipRecipe, dataset: str, found: Splits | PreparedDataset, most: int) -> SearchImages:
    group: Group = "base" if recipe.data.protocol == "base_to_new" else "all"
    seed = recipe.seeds[0]
    if isinstance(found, PreparedDataset):
        return search_images(dataset, found.few_shots(seed, group), found.validation_images(seed, group), most)
    drawn = few_shot(found, recipe.data.shots, seed, recipe.data.fewer) if recipe.data.shots else found
    part = group_of_classes(drawn, group)
    labels = sorted({image.label for image in part.train})
    return search_images(dataset, _group(labels, part.train), _group(labels, part.val), most)


def _group(labels: list[int], images: Iterable[LabelledImage]) -> ClassGroup:
    """The images as a group of the classes with these labels."""
    places = {label: place for place, label in enumerate(labels)}
    found = tuple(places[image.label] for image in images)
    return ClassGroup(tuple(map(str, labels)), tuple(range(len(found))), found)
