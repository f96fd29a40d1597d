"""The check of descriptions of classes: every class has some, and each text fits the text tower."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from transformers import AutoConfig

from data_prep.sources.split_zhou import read_dataset
from pipeline.check.clip_backbone import words_of
from pipeline.check.findings import counted
from pipeline.clip.images.prepared import CLASSES_FILE, ClassList
from pipeline.clip.learning.descriptions import Descriptions
from pipeline.clip.methods import learner_of_sizes
from pipeline.clip.recipe import ClipMethodConfig, ClipRecipe
from pipeline.clip.recipe_data import DatasetConfig
from pipeline.clip.towers.backbone import Sizes
from pipeline.errors import UserError, UserErrors
from pipeline.hub import repository as hub


def check_descriptions(recipe: ClipRecipe) -> str:
    """Describe the descriptions that rows use; UserErrors with a sentence for each file that cannot be used."""
    found: list[str] = []
    wrong: list[str] = []
    for method in recipe.methods:
        for entry in recipe.data.datasets if method.descriptions is not None else ():
            assert method.descriptions is not None
            try:
                read = Descriptions.read(method.descriptions, entry.name)
                names = _class_names(recipe, entry)
                if names:
                    texts = read.described(names)
                    _refuse_long_texts(recipe, method, texts)
                    found.append(f"{method.name}, {entry.name}: {counted(len(texts), 'text')} of {len(names)} classes")
            except UserError as error:
                wrong.append(f"methods.{method.name}.descriptions: {error}")
    if wrong:
        raise UserErrors(list(dict.fromkeys(wrong)))
    return "; ".join(found) or "read; the classes are not known before the data is there"


def _class_names(recipe: ClipRecipe, entry: DatasetConfig) -> list[str]:
    """The class names of a dataset, prepared or not; none where they are not known yet."""
    folder = Path(recipe.data.prepared) / entry.name
    with contextlib.suppress(UserError):
        if (folder / CLASSES_FILE).is_file():
            return ClassList.read(folder).names
        if recipe.data.source == "folders":
            return read_dataset(entry.description, Path(recipe.data.root)).names()
    return []


def _refuse_long_texts(recipe: ClipRecipe, method: ClipMethodConfig, texts: list[str]) -> None:
    """Raise UserError for a text with more tokens than the tower reads; says nothing where the model is not here."""
    model = recipe.model
    folder = hub.local_folder(model.location, model.revision)
    if folder is None:
        return
    try:
        config = AutoConfig.from_pretrained(folder)
        words = words_of(model, folder, config)
    except (OSError, ValueError, UserError):
        return  # which the check of the model reports
    with torch.device("meta"):
        learner = learner_of_sizes(method.kind, Sizes.of(config), 0, **method.options)
    learner.texts(words, texts)
