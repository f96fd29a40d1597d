"""Prints the names of a recipe's stages, one per line: `python slurm/stages.py RECIPE [--set A.B=C ...]`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.config.load import load_recipe
from pipeline.errors import EXIT_USER, UserError
from pipeline.methods import make_method


def stages(
    recipe: str,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C")] = None,
    skip_bad: Annotated[int | None, typer.Option(metavar="N")] = None,
) -> None:
    """Print the names of a recipe's stages, one per line."""
    loaded = load_recipe(recipe, overrides or [])
    for stage in make_method(loaded.method).stages([task.name for task in loaded.data.tasks]):
        print(stage.name)


if __name__ == "__main__":
    try:
        typer.run(stages)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)
