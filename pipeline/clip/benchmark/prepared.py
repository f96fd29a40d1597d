"""Checks that every dataset of a benchmark is prepared, with the recipe's settings."""

from __future__ import annotations

from pathlib import Path

from pipeline.clip.images.prepared import PreparedDataset
from pipeline.clip.learning.unit import descriptions_of
from pipeline.clip.recipe import ClipRecipe, datasets_of
from pipeline.clip.recipe_data import ClipDataConfig, DatasetConfig
from pipeline.data.origin import REMEDY, other_settings
from pipeline.errors import UserError
from pipeline.files.paths import command


def require_prepared(recipe: ClipRecipe, name: str) -> None:
    """Raise UserError, with the command to run, unless every dataset is prepared with the recipe's settings.

    And for a class that the descriptions of a row leave out.
    """
    described = descriptions_of(recipe)
    for entry, trained in datasets_of(recipe):
        folder = Path(recipe.data.prepared) / entry.name
        if not folder.is_dir():
            raise UserError(
                f"dataset '{entry.name}' is not prepared: there is no {folder}; run `{command('prepare', name)}` first."
            )
        found = PreparedDataset(folder)
        refuse_other_settings(recipe.data, entry, trained, found)
        for (_, dataset), descriptions in described.items():
            if dataset == entry.name:
                descriptions.of(found.classes.names)
        wanted = {"shots": recipe.data.shots, "fewer": recipe.data.fewer}
        if trained and found.classes.sampling != wanted:
            raise UserError(
                f"dataset '{entry.name}' in {folder} was prepared with {found.classes.sampling or 'no training'}, the "
                f"recipe wants {wanted}; run `{command('prepare', name)}`."
            )
        for seed in recipe.seeds if trained and found.labelled else ():
            found.few_shots(seed, "all")
            if recipe.searches:
                found.validation_images(seed, "all")


def refuse_other_settings(data: ClipDataConfig, entry: DatasetConfig, trained: bool, found: PreparedDataset) -> None:
    """Raise UserError when a dataset was prepared with other settings than the recipe's."""
    learned = {"train": found.train, "val": found.val} if trained else {}
    for split, shards in {"test": found.test, **learned}.items():
        if shards is not None:
            clause = other_settings(shards.description, data.split_settings(entry, split))
            if clause is not None:
                raise UserError(f"{shards.folder} {clause}. {REMEDY}")
