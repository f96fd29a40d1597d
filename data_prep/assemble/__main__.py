"""`python -m data_prep.assemble RECIPE` joins a vision tower, a language model and a projector to one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.assemble.recipe import load_assemble_recipe
from pipeline.cli.lazy import lazy
from pipeline.cli.outcome import App, finish
from pipeline.errors import for_user
from pipeline.ranks.outcome import Outcome

if TYPE_CHECKING:
    from data_prep.assemble import checkpoint
else:
    checkpoint = lazy("data_prep.assemble.checkpoint")

app = App(help=__doc__, add_completion=False)


@app.command()
def assemble(
    recipe: Annotated[str, typer.Argument(help="name or file of a recipe of an assembled model, such as small")],
    out: Annotated[Path | None, typer.Option(help="folder of the checkpoint; default: the recipe's")] = None,
) -> None:
    """Write the checkpoint of a recipe."""
    try:
        loaded, base = load_assemble_recipe(recipe)
        folder = checkpoint.assemble(loaded, base, out or Path(loaded.out.format(name=loaded.name)))
    except Exception as error:  # a command line of one command has no group of `Verbs`, which does this elsewhere
        shown = for_user(error)
        if shown is None:
            raise
        finish(Outcome(shown.exit_code, str(shown)), as_json=False)
    typer.echo(f"{loaded.name} in {folder}")


if __name__ == "__main__":
    app(prog_name="python -m data_prep.assemble")
