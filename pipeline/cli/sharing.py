"""The verbs that write adapters: `export`, `merge` and `prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli import completion
from pipeline.cli.lazy import lazy
from pipeline.cli.options import AsJson, Learned, Model
from pipeline.cli.outcome import show
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.adapter import edit as editing
    from pipeline.adapter import from_run, peft_folder
    from pipeline.adapter.vocabulary import export as vocabulary
else:
    editing, from_run = lazy("pipeline.adapter.edit"), lazy("pipeline.adapter.from_run")
    vocabulary = lazy("pipeline.adapter.vocabulary.export")
    peft_folder = lazy("pipeline.adapter.peft_folder")

Form = Literal["adapter", "vocabulary", "parts", "lora", "peft"]


def export(
    run: Learned,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the adapter, or of the checkpoint.")],
    form: Annotated[
        Form,
        typer.Option(
            "--as",
            help="adapter: what was learned, without the frozen model. vocabulary: the frozen model's checkpoint with "
            "prompt sets as special tokens, for any server. parts: that checkpoint without sets, for a vLLM that gets "
            "their vectors with each request. lora: that checkpoint with a task's low-rank update per folder. peft: a "
            "folder of PEFT's prompt tuning for each set.",
        ),
    ] = "adapter",
    model: Model = None,
    copy: Annotated[
        bool,
        typer.Option("--copy", help="With --as vocabulary or parts: copy files of frozen weights, do not link them."),
    ] = False,
    licence: Annotated[
        str | None,
        typer.Option("--licence", "--license", help="Licence of the prompt sets, for the model card."),
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload it to the hub too.")] = None,
    public: Annotated[bool, typer.Option(help="Let everybody see the repository that --push makes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the learned pool of all stages as one portable adapter, or a checkpoint with which others answer."""
    if form == "peft":
        if push is not None or copy or licence is not None:
            raise UserError("--push, --copy and --licence are not for --as peft; leave them out.")
        show(peft_folder.export_peft(run, target, model), as_json)
        return
    if form != "adapter":
        if push is not None:
            raise UserError(
                f"--push uploads adapters; `hf upload {push} {target}` uploads a checkpoint, once it is written."
            )
        show(vocabulary.export_checkpoint(run, target, form, model, licence, link=not copy), as_json)
        return
    if model is not None or copy:
        raise UserError(
            "--model and --copy are options of --as vocabulary and parts; an adapter holds no frozen model."
        )
    result = from_run.export(run, target, licence)
    if push is not None:
        result["pushed"] = editing.push(target, push, public)
    show(result, as_json)


def from_peft(
    adapter: Learned,
    name: Annotated[str, typer.Argument(metavar="SET", help="The prompt set that gets other vectors.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What PEFT saved of its prompt tuning.")],
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Folder of the new adapter.")],
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Make an adapter in which one prompt set has the vectors of a folder of PEFT's prompt tuning."""
    show(peft_folder.from_peft(adapter, name, folder, into, model), as_json)


def merge(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Adapters of the same models.")],
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Folder of the new adapter.")],
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several that were trained apart; no prompt set changes."""
    show(editing.merge(adapters, into), as_json)


def prune(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter.")],
    tasks: Annotated[list[str], typer.Argument(metavar="TASK", help="Tasks to drop.", autocompletion=completion.sets)],
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Folder of the new adapter.")],
    as_json: AsJson = False,
) -> None:
    """Drop tasks from an adapter; the other prompt sets stay as they are."""
    show(editing.prune(adapter, tasks, into), as_json)
