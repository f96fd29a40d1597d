"""Loads a recipe, or the recipe of a run: applies overrides and validates it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pydantic import ValidationError

from pipeline.config.kinds import recipe_kind, run_kind
from pipeline.config.messages import sentence
from pipeline.config.recipe import Recipe
from pipeline.config.task_file import with_task_files
from pipeline.config.yaml_file import CONFIG, STATE, apply_overrides, find_recipe, read_recipe
from pipeline.errors import UserError, nearest


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the recipe of that name or file with `a.b=value` overrides applied.

    Raises UserError with a sentence per wrong field: what was found and what was expected.
    """
    if recipe_kind(name_or_path) == "clip":
        raise UserError(
            f"recipe '{name_or_path}' is a benchmark of prompt methods on CLIP; expected a task sequence. A benchmark "
            "is prepared and run whole, by `python -m pipeline prepare` and `run`."
        )
    path = find_recipe(str(name_or_path))
    fields = read_recipe(path)
    if path.name == CONFIG and (path.parent / STATE).is_file():
        fields = Recipe.as_a_run_meant(fields)
    fields = with_task_files(apply_overrides(fields, overrides))
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"recipe '{name_or_path}': {sentence(error, Recipe)}") from error


def load_run(run_path: Path) -> Recipe:
    """Return the recipe of a run folder; UserError when the folder is no run of a sequence."""
    if not (run_path / CONFIG).is_file():
        runs = [found.parent.name for found in run_path.parent.glob(f"*/{CONFIG}")]
        what = "is a file" if run_path.is_file() else "does not exist"
        found = "has no config.yaml" if run_path.is_dir() else what
        raise UserError(
            f"'{run_path}' {found}; expected the folder of a run, which `python -m pipeline run RECIPE` makes."
            + nearest(run_path.name, runs)
        )
    if run_kind(run_path) == "clip":
        raise UserError(
            f"'{run_path}' is a benchmark of prompt methods on CLIP; expected the run of a task sequence. What it "
            f"learned is in {run_path / 'units'}; "
            f"`python -m pipeline predict {run_path} --image FILE` names the class of an image."
        )
    return as_recorded(load_recipe(run_path / CONFIG), run_path)


def as_recorded(recipe: Recipe, run_path: Path) -> Recipe:
    """The recipe of a run, with former defaults of fields that the recipe leaves out and the run is older than."""
    path, field = run_path / CONFIG, "repetition_penalty"
    if not path.is_file():
        return recipe
    recorded = read_recipe(path)
    if field not in recipe.evaluate.model_fields_set and field not in (recorded.get("evaluate") or {}):
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={field: "checkpoint"})})
    return recipe.continuing(recorded)
