"""The verbs for what was learned: asking, serving, sharing, listing, and tasks of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Show = Callable[[dict[str, Any], bool], None]
Learned = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run or of an exported adapter.")]
Model = Annotated[
    str | None, typer.Option(help="Where the frozen multimodal model is on this machine, if not where it was.")
]
Clip = Annotated[str | None, typer.Option(help="Where the frozen CLIP is on this machine, if not where it was.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]


def add_verbs(app: typer.Typer, show: Show) -> None:
    """Add the verbs to the command line; `show` prints a result."""

    @app.command()
    def serve(
        run: Learned,
        host: Annotated[str, typer.Option(help="Address to listen at; beyond this machine a key is needed.")] = (
            "127.0.0.1"
        ),
        port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")] = 8000,
        batch: Annotated[int, typer.Option(min=1, help="Answers that are generated together.")] = 32,
        queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told to come back.")] = 256,
        max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that may be asked for.")] = 256,
        max_pixels: Annotated[int, typer.Option(min=1, help="Largest image, width times height.")] = 4096 * 4096,
        max_body: Annotated[int, typer.Option(min=1024, help="Largest request in bytes.")] = 8 << 20,
        name: Annotated[str | None, typer.Option(help="What clients call the model; by default the folder.")] = None,
        model: Model = None,
        clip: Clip = None,
    ) -> None:
        """Answer questions over HTTP as OpenAI's chat API does; a key is read from PIPELINE_API_KEY."""
        from pipeline.serve.server import serve as serve_folder

        serve_folder(run, host, port, batch, queue, max_tokens, max_pixels, max_body, name, model, clip)
