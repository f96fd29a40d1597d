"""The verbs that answer questions: `predict`, `chat` and `serve`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from pipeline.cli import completion
from pipeline.cli.lazy import lazy
from pipeline.cli.options import AsJson, Clip, Learned, Model, UnfamiliarMode
from pipeline.cli.outcome import show
from pipeline.config.kinds import run_kind
from pipeline.errors import UserError, require_extras
from pipeline.serve.options import BATCH, EngineKind, EngineOptions, Options, SetsForm

if TYPE_CHECKING:
    from pipeline.adapter import chat as chatting
    from pipeline.adapter import load as loading
    from pipeline.adapter import predict as predicting
    from pipeline.clip.benchmark import classify as classifying
    from pipeline.serve import server
    from pipeline.serve.front import server as front_server
else:
    chatting, loading, predicting = map(
        lazy, ("pipeline.adapter.chat", "pipeline.adapter.load", "pipeline.adapter.predict")
    )
    server, classifying = lazy("pipeline.serve.server"), lazy("pipeline.clip.benchmark.classify")
    front_server = lazy("pipeline.serve.front.server")


def predict(
    run: Learned,
    question: Annotated[
        str | None, typer.Option(help="What to ask; a benchmark's run on CLIP names the picture's class without it.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Picture to ask about; none: only the question routes.")] = None,
    task: Annotated[
        str | None, typer.Option(help="The task, for methods that need it.", autocompletion=completion.sets)
    ] = None,
    unit: Annotated[
        str | None, typer.Option(metavar="NAME", help="Unit of a benchmark's run that has several.")
    ] = None,
    unfamiliar: UnfamiliarMode = None,
    model: Model = None,
    clip: Clip = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question with a run's prompt sets and show which were selected; on CLIP, name a picture's class."""
    if run_kind(run) == "clip":
        _refuse(f"'{run}' is a benchmark on CLIP", question=question, task=task, unfamiliar=unfamiliar)
        show(classifying.classify(run, image, unit, clip or model), as_json)
        return
    _refuse(f"'{run}' is no benchmark's run", unit=unit)
    if question is None:
        raise UserError('there is no --question; expected what to ask, such as --question "what is this?".')
    show(predicting.predict(run, image, question, task, model, clip, unfamiliar), as_json)


def _refuse(why: str, **given: object) -> None:
    """Raise UserError for options that were given and have no meaning here."""
    said = [f"--{name}" for name, value in given.items() if value is not None]
    if said:
        raise UserError(f"{why}, where {' and '.join(said)} mean{'s' * (len(said) == 1)} nothing; leave it out.")


def serve(
    run: Learned,
    host: Annotated[str, typer.Option(help="Address to listen at; other than loopback it needs an API key.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free one.")] = 8000,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Most answers decoded together; by default 256, with engine vllm 32.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Most requests that wait; further ones get status 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer that a request may ask for.")] = 256,
    max_pixels: Annotated[int, typer.Option(min=1, help="Largest image, width times height.")] = 4096 * 4096,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest request in bytes.")] = 8 << 20,
    memory: Annotated[
        float | None, typer.Option(min=0.001, help="Most GiB for keys and values; by default what the device has.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default the folder.")] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Origin of web pages that may send requests (CORS); repeatable."),
    ] = None,
    ignore_system: Annotated[
        bool, typer.Option("--ignore-system", help="Answer requests with system messages, which have no effect.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no line per request.")] = False,
    engine: Annotated[
        EngineKind, typer.Option(help="own: this process answers. vllm: routing here, answers by an unmodified vLLM.")
    ] = "own",
    behind: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A running vLLM with the exported checkpoint; without it one is started."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The exported checkpoint that vLLM is started with; written if missing."),
    ] = None,
    vllm: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The command `vllm` of another environment; by default that of this one."),
    ] = None,
    sets: Annotated[
        SetsForm | None,
        typer.Option(
            help="How vLLM gets the prompt sets. vocabulary (default): as tokens of the checkpoint. parts: as vectors "
            "in each request, so that a new task needs no restart. lora: low-rank updates that vLLM has loaded."
        ),
    ] = None,
    engine_args: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Further options of `vllm serve`, in one text.")
    ] = None,
    unfamiliar: UnfamiliarMode = None,
    model: Model = None,
    clip: Clip = None,
) -> None:
    """Answer questions over HTTP by OpenAI's chat API; the API key is read from PIPELINE_API_KEY."""
    started = {"checkpoint": checkpoint, "vllm": vllm, "engine-args": engine_args}
    if engine == "own":
        _refuse("--engine is own", behind=behind, sets=sets, **started)
    else:
        _refuse("--engine is vllm", memory=memory)
        if behind is not None:
            _refuse("--behind names a running engine", **started)
    require_extras("serve")
    options = Options(
        host,
        port,
        BATCH[engine] if batch is None else batch,
        queue,
        memory,
        max_tokens,
        max_pixels,
        max_body,
        name,
        tuple(origin or ()),
        ignore_system,
        quiet,
        unfamiliar,
    )
    if engine == "own":
        server.serve(run, options, model, clip)
    else:
        arguments = tuple(shlex.split(engine_args or ""))
        chosen = EngineOptions(behind, checkpoint, vllm, arguments, sets or "vocabulary")
        front_server.serve_front(run, options, chosen, model, clip)


def chat(
    run: Learned,
    image: Annotated[Path | None, typer.Option(help="Picture to begin with.")] = None,
    unfamiliar: UnfamiliarMode = None,
    model: Model = None,
    clip: Clip = None,
) -> None:
    """Ask a run or an adapter question after question about a picture."""
    console = Console()
    answerer = loading.load_adapter(run, model, clip, unfamiliar=unfamiliar)

    def ask(prompt: str) -> str:
        # Piped questions need no prompt. Text, so that rich does not read square brackets as markup.
        return console.input(Text(prompt)) if sys.stdin.isatty() else input()

    chatting.chat(answerer, image, ask, lambda line: console.print(Text(line)))
