"""The verb `label`, and `run --label`: a page on which a person labels the images that a run asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.lazy import lazy
from pipeline.cli.options import AsJson, RunFolder
from pipeline.cli.outcome import show
from pipeline.errors import EXIT_RESUMABLE, Interrupted, require_extras
from pipeline.ranks.environment import is_distributed
from pipeline.runs.layout import ASK

if TYPE_CHECKING:
    from pipeline.clip.labelling import server
else:
    server = lazy("pipeline.clip.labelling.server")

Port = Annotated[int, typer.Option(min=0, max=65535, help="Port of the labelling page; 0: any free one.")]


def label(run: RunFolder, port: Port = 8000, as_json: AsJson = False) -> None:
    """Serve a page on this machine on which a person labels the images that a run asks for."""
    require_extras("serve")
    _serve(run, server.Desk(port))
    show({"run": str(run), "next": "the command that started the run goes on"}, as_json)


def until_labelled(start: Callable[[], None], run: Path, port: int) -> None:
    """Call `start`, and again after each round that a person has labelled on the page; ranks of a launch only start."""
    if is_distributed():
        start()
        return
    require_extras("serve")
    desk = server.Desk(port)
    while True:
        try:
            start()
            return
        except (Interrupted, typer.Exit) as stopped:
            if stopped.exit_code != EXIT_RESUMABLE or not (run / ASK).is_file():
                raise
        _serve(run, desk)


def _serve(run: Path, desk: server.Desk) -> None:
    """Serve the page; raises Interrupted where it ended before all images were labelled."""
    waiting = server.label(run, desk)
    if waiting:
        raise Interrupted(f"{waiting} images of {run / ASK} have no class yet. Run the same command again to go on.")
