"""`python -m data_prep prepare RECIPE` writes shards and keys; `python -m data_prep verify FOLDER` checks them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import EXIT_USER, UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command("prepare")
def prepare_command(
    recipe: Annotated[str, typer.Argument(help="recipe name or file")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override a field: a.b=value")] = None,
    skip_bad: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="leave out up to N bad records and list them")
    ] = None,
) -> None:
    """Write the shards and CLIP keys of a recipe; what is up to date is kept."""
    from data_prep.prepare import prepare  # here: torch and transformers take seconds, --help should not
    from pipeline.config import load_recipe

    changes = [*(overrides or []), *([] if skip_bad is None else [f"data.skip_bad={skip_bad}"])]
    for split in prepare(load_recipe(recipe, changes))["splits"]:
        wrote = " and ".join(split["wrote"])
        typer.echo(
            f"{split['task']}/{split['split']}: {split['samples']} samples in {split['shards']} shards, "
            + (f"wrote {wrote}" if wrote else "up to date")
        )


@app.command("verify")
def verify_command(folder: Annotated[Path, typer.Argument(help="a prepared split, or a folder of them")]) -> None:
    """Check every prepared split under FOLDER: hashes, index, images and keys."""
    from data_prep.verify import verify_all

    for split in verify_all(folder):
        typer.echo(f"{split}: whole")


def main() -> None:
    """Run the command line; wrong input ends with one sentence and exit code 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER)


if __name__ == "__main__":
    main()
