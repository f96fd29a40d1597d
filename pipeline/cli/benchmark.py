"""What the command line does with a benchmark recipe."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.clip.benchmark.prepared import require_prepared
from pipeline.clip.recipe import ClipRecipe, load_benchmark


def load(verb: str, name: str, overrides: Iterable[str]) -> ClipRecipe:
    """The recipe of that name, or, to evaluate, the recipe of the run in that folder."""
    if verb == "evaluate":
        recipe = load_benchmark(str(Path(name) / "config.yaml"))
        return recipe.model_copy(update={"run_dir": name.replace("{", "{{").replace("}", "}}")})
    return load_benchmark(name, overrides)


def prepare(name: str, overrides: Iterable[str], replace: bool = False) -> dict[str, Any]:
    """Prepare a recipe's datasets; `replace`: also over data that another recipe or a run depends on."""
    from data_prep.benchmark import prepare_benchmark

    return prepare_benchmark(load_benchmark(name, overrides), replace=replace)


def before_ranks(recipe: ClipRecipe, name: str) -> None:
    """What is said before ranks have started and loaded anything; UserError."""
    from pipeline.runs.claim import claim_run

    if recipe.data.prepare_first:
        from data_prep.benchmark import prepare_benchmark

        prepare_benchmark(recipe)
    require_prepared(recipe, name)
    claim_run(recipe)


def work(verb: str, recipe: ClipRecipe) -> dict[str, Any]:
    """Do the verb's work on this rank."""
    from pipeline.clip.benchmark.run import run_benchmark

    return run_benchmark(recipe, train=verb != "evaluate", evaluate=verb != "train")
