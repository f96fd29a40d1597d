"""The command line: all verbs under their headings. `pipeline.cli.outcome` shows results and errors."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import asking, comparing, labelling, looking, own, sharing, training
from pipeline.cli.outcome import App, ShowVersion
from pipeline.ranks import launch

# Headings of the help with their verbs, in the order in which they are shown.
VERBS = {
    "Train a recipe": (
        training.check,
        training.prepare,
        training.run,
        training.train,
        training.evaluate,
        labelling.label,
    ),
    "Look at runs": (looking.report, looking.ls, looking.ui, comparing.compare),
    "Use what was learned": (asking.predict, asking.serve, asking.chat),
    "Adapters": (sharing.export, sharing.merge, sharing.prune, sharing.from_peft),
    "A task of your own": (own.new_task, own.add, own.undo),
}

app = App(help="Continual prompt learning on frozen vision-language models.")


@app.callback()
def _before(
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
    version: ShowVersion = False,
) -> None:
    """Continual prompt learning on frozen vision-language models."""
    # The deepspeed launcher puts --local_rank before the verb; it is accepted and ignored, since the environment has
    # it too. DeepSpeed compiles its CPU collectives with ninja, which is installed beside this Python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # in a log every update of a bar is a line
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the launcher sets it to the ranks' numbers, which torch reads as GPUs


for _heading, _verbs in VERBS.items():
    for _verb in _verbs:
        app.command(rich_help_panel=_heading)(_verb)


def main() -> None:
    """Run the command line."""
    launch.end_as_rank(lambda: app(prog_name="pipeline"))
