"""`python -m data_prep.small train` trains the projector of the recipe `small` (or of another one) for its parts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.lazy import lazy
from pipeline.cli.outcome import App

if TYPE_CHECKING:
    from data_prep.small import train as training
else:
    training = lazy("data_prep.small.train")

app = App(help=__doc__, add_completion=False)


@app.callback()
def main() -> None:
    """The projector of the recipe `small`."""


@app.command()
def train(
    photographs: Annotated[Path, typer.Argument(help="folder of photographs; their labels are not needed")],
    like: Annotated[str, typer.Option(help="pattern of the names of its files to use")] = "*.jpg",
    recipe: Annotated[
        str, typer.Option(help="the assembled model's recipe, of which vision and language are used")
    ] = "small",
    out: Annotated[Path, typer.Option(help="the projector, a .safetensors")] = Path("projector.safetensors"),
    work: Annotated[Path, typer.Option(help="folder for features that are computed once")] = Path("data/small"),
    minutes: Annotated[float, typer.Option(help="minutes of training through the language model")] = 120,
    place_steps: Annotated[int, typer.Option(min=1, help="steps before, on words for places")] = 2000,
    drawings: Annotated[int, typer.Option(min=20, help="pictures to draw")] = 4000,
    seed: Annotated[int, typer.Option(help="seed of initial values and of the order")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
    start: Annotated[
        Path | None, typer.Option(help="an earlier projector to go on from, in place of the first step")
    ] = None,
) -> None:
    """Train a projector; it is saved every 50 steps, so a training that is cut off leaves one too."""
    how = training.Training(minutes, place_steps, drawings, seed, threads, start)
    training.train(recipe, training.Photographs(photographs, like), out, work, how)


if __name__ == "__main__":
    app(prog_name="python -m data_prep.small")
