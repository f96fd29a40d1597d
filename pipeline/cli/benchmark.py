"""What the command line does with a benchmark recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.clip.images.prepared import PreparedDataset
from pipeline.clip.recipe import ClipRecipe, clip_recipe, datasets_of
from pipeline.clip.recipe_data import DatasetConfig
from pipeline.config.yaml_file import apply_overrides, find_recipe, read_recipe
from pipeline.data.origin import REMEDY, other_settings
from pipeline.errors import UserError
from pipeline.files.paths import command


def load(verb: str, name: str, overrides: Iterable[str]) -> ClipRecipe:
    """The recipe of that name, or, to evaluate, the recipe of the run in that folder."""
    if verb == "evaluate":
        recipe = load_benchmark(str(Path(name) / "config.yaml"))
        return recipe.model_copy(update={"run_dir": name.replace("{", "{{").replace("}", "}}")})
    return load_benchmark(name, overrides)


def load_benchmark(name: str, overrides: Iterable[str] = ()) -> ClipRecipe:
    """The benchmark recipe of that name or file with overrides; UserError, one sentence for all that is wrong."""
    return clip_recipe(apply_overrides(read_recipe(find_recipe(name)), overrides), name)


def prepare(name: str, overrides: Iterable[str], replace: bool = False) -> dict[str, Any]:
    """Prepare a recipe's datasets; `replace`: also over data that another recipe or a run depends on."""
    from data_prep.benchmark import prepare_benchmark

    return prepare_benchmark(load_benchmark(name, overrides), replace=replace)


def before_ranks(recipe: ClipRecipe, name: str) -> None:
    """What is said before ranks have started and loaded anything; UserError."""
    from pipeline.runs.finished import claim_run

    if recipe.data.prepare_first:
        from data_prep.benchmark import prepare_benchmark

        prepare_benchmark(recipe)
    require_prepared(recipe, name)
    claim_run(recipe)


def require_prepared(recipe: ClipRecipe, name: str) -> None:
    """Raise UserError, with the command that prepares it, unless every dataset has been prepared as the recipe says."""
    for entry, trained in datasets_of(recipe):
        folder = Path(recipe.data.prepared) / entry.name
        if not folder.is_dir():
            raise UserError(
                f"dataset '{entry.name}' is not prepared: there is no {folder}; run `{command('prepare', name)}` first."
            )
        found = PreparedDataset(folder)
        refuse_other_settings(recipe, entry, trained, found)
        wanted = {"shots": recipe.data.shots, "fewer": recipe.data.fewer}
        if trained and found.classes.sampling != wanted:
            raise UserError(
                f"dataset '{entry.name}' in {folder} was prepared with {found.classes.sampling or 'no training'}, the "
                f"recipe wants {wanted}; run `{command('prepare', name)}`."
            )
        for seed in recipe.seeds if trained else ():
            found.few_shots(seed, "all")


def refuse_other_settings(recipe: ClipRecipe, entry: DatasetConfig, trained: bool, found: PreparedDataset) -> None:
    """Raise UserError when a prepared dataset was made by other settings than the recipe's."""
    for split, shards in (("test", found.test), ("train", found.train if trained else None)):
        if shards is not None:
            clause = other_settings(shards.description, recipe.data.split_settings(entry, split))
            if clause is not None:
                raise UserError(f"{shards.folder} {clause}. {REMEDY}")


def work(verb: str, recipe: ClipRecipe) -> dict[str, Any]:
    """Do the verb's work on this rank."""
    from pipeline.clip.benchmark.run import run_benchmark

    return run_benchmark(recipe, train=verb != "evaluate", evaluate=verb != "train")
