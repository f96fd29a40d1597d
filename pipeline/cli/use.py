"""The verbs for what was learned: asking, serving, sharing, listing, and tasks of one's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import completion
from pipeline.cli.outcome import LOOK, OWN, SHARE, USE, show
from pipeline.files.paths import command

Then = Callable[[dict[str, Any]], dict[str, Any]]
Train = Callable[[str, list[str], bool, Then], None]
Learned = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="Folder of a run or of an exported adapter.", autocompletion=completion.runs),
]
Model = Annotated[
    str | None, typer.Option(help="Where the frozen multimodal model is on this machine, if not where it was.")
]
Clip = Annotated[str | None, typer.Option(help="Where the frozen CLIP is on this machine, if not where it was.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]


def add_verbs(app: typer.Typer, train: Train) -> None:
    """Add the verbs to the command line; `train` runs a recipe with overrides.

    The function that `train` is given last sees the result before it is shown.
    """

    @app.command(rich_help_panel=USE)
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
        memory: Annotated[
            float | None, typer.Option(min=0.001, help="Most GiB for keys and values; by default what the device has.")
        ] = None,
        name: Annotated[str | None, typer.Option(help="What clients call the model; by default the folder.")] = None,
        origin: Annotated[
            list[str] | None,
            typer.Option(metavar="ORIGIN", help="Origin of pages that may ask from a browser; may be repeated."),
        ] = None,
        ignore_system: Annotated[
            bool, typer.Option("--ignore-system", help="Answer requests with system messages, which have no effect.")
        ] = False,
        quiet: Annotated[bool, typer.Option("--quiet", help="Print no line per request.")] = False,
        model: Model = None,
        clip: Clip = None,
    ) -> None:
        """Answer questions over HTTP as OpenAI's chat API does; a key is read from PIPELINE_API_KEY."""
        from pipeline.serve.server import Options
        from pipeline.serve.server import serve as serve_folder

        options = Options(
            host,
            port,
            batch,
            queue,
            memory,
            max_tokens,
            max_pixels,
            max_body,
            name,
            tuple(origin or ()),
            ignore_system,
            quiet,
        )
        serve_folder(run, options, model, clip)

    @app.command(rich_help_panel=USE)
    def chat(
        run: Learned,
        image: Annotated[Path | None, typer.Option(help="Picture to begin with.")] = None,
        model: Model = None,
        clip: Clip = None,
    ) -> None:
        """Ask a run or an adapter question after question about a picture."""
        from rich.console import Console
        from rich.text import Text

        from pipeline.adapter.chat import chat as converse
        from pipeline.adapter.load import load_adapter

        console = Console()
        answerer = load_adapter(run, model, clip)

        def ask(prompt: str) -> str:
            # Piped questions need no prompt. As Text: what stands in square brackets is not markup.
            return console.input(Text(prompt)) if sys.stdin.isatty() else input()

        converse(answerer, image, ask, lambda line: console.print(Text(line)))

    @app.command("ls", rich_help_panel=LOOK)
    def list_all(
        folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that holds the runs.")] = Path("runs"),
        as_json: AsJson = False,
    ) -> None:
        """List the runs with their key figures."""
        from rich.console import Console

        from pipeline.report.listing import list_runs, runs_table

        rows = list_runs(folder)
        Console().print(runs_table(rows))
        for row in rows:
            if row["note"]:
                typer.echo(f"{row['run']}: {row['note']}")
        if as_json:
            show({"runs": rows}, as_json)

    @app.command(rich_help_panel=SHARE)
    def merge(
        adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER", help="Adapters of the same models.")],
        into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Folder of the new adapter.")],
        as_json: AsJson = False,
    ) -> None:
        """Make one adapter of several that were trained apart; no prompt set changes."""
        from pipeline.adapter.edit import merge as merge_adapters

        show(merge_adapters(adapters, into), as_json)

    @app.command(rich_help_panel=SHARE)
    def prune(
        adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter.")],
        tasks: Annotated[
            list[str], typer.Argument(metavar="TASK", help="Tasks to drop.", autocompletion=completion.sets)
        ],
        into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Folder of the new adapter.")],
        as_json: AsJson = False,
    ) -> None:
        """Drop tasks from an adapter; the other prompt sets stay as they are."""
        from pipeline.adapter.edit import prune as prune_adapter

        show(prune_adapter(adapter, tasks, into), as_json)

    @app.command("new-task", rich_help_panel=OWN)
    def new_task(
        name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the task.")],
        images: Annotated[Path, typer.Option(metavar="FOLDER", help="Folder that the image paths start at.")],
        samples: Annotated[Path, typer.Option(metavar="FILE", help="CSV or JSONL with image, question, answer.")],
        root: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the task is written.")] = Path("data/own"),
        test_share: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of the samples to test with.")] = 0.2,
        metric: Annotated[str, typer.Option(help="How answers are scored.")] = "exact_ci",
        max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 16,
        seed: Annotated[int, typer.Option(min=0, help="Decides which samples are for testing.")] = 0,
        as_json: AsJson = False,
    ) -> None:
        """Make a task of a folder of images and a table of questions and answers, and draw ten samples of it."""
        from data_prep.own_task import make_task

        made = make_task(name, images, samples, root, test_share, metric, max_new_tokens, seed)
        if not made["pictures"]:
            typer.echo(f"{name} has no pictures: {samples} has no image in any line, and every question stands alone.")
        show({**made, "next": command("add", "RUN", name, "--root", root)}, as_json)

    @app.command(rich_help_panel=OWN)
    def add(
        run: Annotated[
            Path, typer.Argument(metavar="RUN", help="Folder of a finished run.", autocompletion=completion.runs)
        ],
        task: Annotated[
            str,
            typer.Argument(
                metavar="TASK", help="A task in the folder that --root names.", autocompletion=completion.own_tasks
            ),
        ],
        root: Annotated[Path, typer.Option(metavar="FOLDER", help="CoIN folder of the task.")] = Path("data/own"),
        gate: Annotated[
            float | None,
            typer.Option(min=0, help="The run's method.gate from this stage on: a smaller one mixes fewer sets."),
        ] = None,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Only say which earlier tasks' questions would get the new set.")
        ] = False,
        as_json: AsJson = False,
    ) -> None:
        """Learn one more task as the next stage of a run; what it has learned stays as it is."""
        from rich.console import Console

        from pipeline.sequence.add_effect import Interference, advice, basis, counted, effect_table, foretell
        from pipeline.sequence.add_task import prepare_addition

        addition = prepare_addition(run, task, root, gate)

        def tell(found: Interference, title: str) -> None:
            if found.effects:
                typer.echo(f"{title}: {basis(found.effects, task)}")
                Console().print(effect_table(found.effects, task))
                for sentence in advice(found, run, task):
                    typer.echo(sentence)

        if addition.is_new or dry_run:
            foretold = foretell(run, addition.recipe)
            tell(foretold, "What the earlier tasks are to expect, by their keys")
            if dry_run:
                told = {"foretold": foretold.effects_json(), "advised": foretold.advised_json()}
                show({"run": str(run), "task": task, **told}, as_json)
                return

        def with_effects(result: dict[str, Any]) -> dict[str, Any]:
            found = counted(run, addition.recipe)
            tell(found, "What became of the earlier tasks")
            return {**result, "earlier": found.effects_json(), "advised": found.advised_json()}

        with addition.written():
            train(str(run / "config.yaml"), [f"run_dir={_run_dir(run)}"], as_json, with_effects)


def _run_dir(run: Path) -> str:
    """The folder as the text of a recipe's run_dir: for YAML `2024` is a number, and braces are filled in."""
    return json.dumps(str(run).replace("{", "{{").replace("}", "}}"), ensure_ascii=False)
