"""Arguments and options shared by several verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import completion
from pipeline.config.unfamiliar import UNFAMILIAR, Unfamiliar

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Name of a shipped recipe, or path of a YAML file.",
        autocompletion=completion.recipes,
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", autocompletion=completion.runs)]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Override a field of the recipe; repeatable.",
        autocompletion=completion.fields,
    ),
]
SkipBad = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Leave out up to N bad records of the data; sets data.skip_bad.")
]
Until = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Stop after stage N; without it the same command continues.")
]
Learned = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Folder of a run or of an exported adapter.", autocompletion=completion.runs),
]
Model = Annotated[str | None, typer.Option(help="Location of the frozen multimodal model, if not the recorded one.")]
Clip = Annotated[str | None, typer.Option(help="Location of the frozen CLIP, if not the recorded one.")]
UnfamiliarMode = Annotated[
    Unfamiliar | None,
    typer.Option(
        metavar="|".join(UNFAMILIAR),
        help="What becomes of a question that resembles no task; by default as method.unfamiliar of the run says.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]
