"""The verbs for a task of your own: `new-task` makes it of a table and images, `add` learns it, `undo` undoes that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

from pipeline.cli import completion, sequence
from pipeline.cli.lazy import lazy
from pipeline.cli.options import AsJson
from pipeline.cli.outcome import show
from pipeline.config.yaml_file import CONFIG
from pipeline.errors import Interrupted, UserError
from pipeline.files.paths import RUNS, command
from pipeline.ranks.environment import is_distributed
from pipeline.ranks.slurm import next_command
from pipeline.runs.layout import stage_folder

if TYPE_CHECKING:
    from data_prep import own_rows, own_task
    from pipeline.config import load as recipes
    from pipeline.report import listing
    from pipeline.runs import folder as folders
    from pipeline.sequence import add_advice as sentences
    from pipeline.sequence import add_effect as effects
    from pipeline.sequence import add_task, learned, reasons, verdict
    from pipeline.sequence import undo as undoing
else:
    own_rows, own_task, listing, folders, effects, add_task, learned, reasons, verdict, undoing = map(
        lazy,
        (
            "data_prep.own_rows",
            "data_prep.own_task",
            "pipeline.report.listing",
            "pipeline.runs.folder",
            "pipeline.sequence.add_effect",
            "pipeline.sequence.add_task",
            "pipeline.sequence.learned",
            "pipeline.sequence.reasons",
            "pipeline.sequence.verdict",
            "pipeline.sequence.undo",
        ),
    )
    sentences, recipes = lazy("pipeline.sequence.add_advice"), lazy("pipeline.config.load")

FIRST = "smolvlm_256m_own"  # the recipe for a first run on own pictures


def new_task(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the task.")],
    samples: Annotated[
        Path,
        typer.Option(metavar="FILE", help="CSV, JSON, .xlsx, Parquet or dataset folder: image, question, answer."),
    ],
    images: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder that image paths start at; left out for images in the table."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COLUMN,...", help="The table's own names, such as image=photo,answer=label."),
    ] = None,
    separator: Annotated[
        str | None, typer.Option(help="Of CSV: comma, semicolon or tab; found by the header if left out.")
    ] = None,
    sheet: Annotated[str | None, typer.Option(help="Of a workbook with several.")] = None,
    root: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the task is written.")] = Path("data/own"),
    test_share: Annotated[float, typer.Option(min=0.01, max=0.9, help="Share of the samples to test with.")] = 0.2,
    metric: Annotated[str, typer.Option(help="How answers are scored.")] = "exact_ci",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Decides which samples are for testing.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a task from a folder of images and a table of questions and answers, and draw ten of its samples."""
    task = own_task.NewTask(name, root, metric, max_new_tokens, test_share, seed)
    made = own_task.make_task(task, images, samples, own_rows.reading_of(columns or (), separator, sheet))
    if not made["pictures"]:
        typer.echo(f"{name} has no pictures: {samples} has no image in any line, and every question stands alone.")
    show({**made, "next": _after_making(name, root)}, as_json)


def _after_making(name: str, root: Path) -> str:
    """The command after `new-task`: adds the task to the run that is there, or begins one with it."""
    there = listing.finished_sequences(RUNS) if RUNS.is_dir() else []
    begin = (FIRST, "--set", f"data.root={_as_text(str(root))}", "--set", f"data.tasks=[{{name: {_as_text(name)}}}]")
    if len(there) == 1 and _knows_drawings_alone(there[0]):
        typer.echo(
            f"The model of {there[0]} is the demo's, which knows drawn shapes, digits, letters and charts and no "
            f"photographs. For these begin a run on another one: `{command('run', *begin)}`."
        )
    if there:
        return next_command("add", there[0] if len(there) == 1 else "RUN", name, "--root", root)
    typer.echo(
        f"There is no finished run in {RUNS} that the task could be added to. The next command begins one with it, on "
        "a small model of the Hub that runs on a CPU; docs/own_data.md names others, and the demo's run, which needs "
        f"no network but knows no photographs. Later tasks are added to it by `{command('add', 'RUN', 'TASK')}`."
    )
    return next_command("run", *begin)


def _knows_drawings_alone(run: Path) -> bool:
    try:
        return reasons.knows_drawings_alone(recipes.load_run(run))
    except UserError:  # a damaged run, which `add` names
        return False


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
    share: Annotated[
        float | None,
        typer.Option(max=1, help="The run's method.share from this stage on: a larger one mixes fewer sets."),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Learn the last task anew, in place of its stage once the new one is whole; without other settings: "
            "bring back what undo has taken.",
        ),
    ] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TRAIN.A=B", help="With --again: how it is trained, from this stage on."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say which earlier tasks' questions would get the new set.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Learn one more task as the next stage of a run; earlier prompt sets are unchanged."""
    changes = {name: value for name, value in {"gate": gate, "share": share}.items() if value is not None}
    if overrides and not again:
        raise UserError(
            f"--set is for a further attempt at {task}; expected --again with it. A first one has the run's settings."
        )
    if again and not overrides and not changes:
        found = undoing.foretold_redo(run, task)
        if found is not None:
            _change(run, found, None if dry_run else lambda: undoing.redo(run, task), "restored", as_json)
            return
    addition = add_task.prepare_addition(run, task, root, changes, (overrides or []) if again else None)

    def tell(found: effects.Interference, title: str) -> None:
        if found.effects:
            typer.echo(f"{title}: {sentences.basis(found.effects, task)}")
            Console().print(sentences.effect_table(found.effects, task))
            for sentence in sentences.advice(found, run, task):
                typer.echo(sentence)

    if addition.is_new or dry_run:
        estimated = effects.estimate(run, addition.recipe)
        tell(estimated, "Expected interference with earlier tasks (estimated from CLIP keys)")
        if dry_run:
            advised = {"advised": estimated.advised_json(), "own": estimated.own}
            fields = {"foretold": estimated.effects_json(), **advised}
            show({"run": str(run), "task": task, **fields}, as_json)
            return

    def with_effects(result: dict[str, Any]) -> dict[str, Any]:
        recipe = recipes.load_run(run)  # as the stage was trained, also where this call went on with an attempt
        found = effects.measure(run, recipe)
        tell(found, "Effect on earlier tasks")
        scores = result.get("learned")
        known = learned.Learned.from_json(scores) if scores is not None else None
        stage = stage_folder(run, len(recipe.data.tasks) - 1, task).name
        folder = folders.read_run(run)
        curve = folder.losses().get(stage, [])
        losses = [line["loss"] for line in curve if line.get("loss") is not None]
        for sentence in learned.sentences(known, recipe, losses):
            typer.echo(sentence)
        poor = known is not None and not known.learned
        faults = verdict.faults_of(folder, recipe)
        for fault in faults:
            # Few held-out samples may be answered by luck, so the test samples are looked at too.
            if fault.task == task and not (poor and fault.kind != "misrouted"):
                typer.echo(fault.sentence)
                poor = poor or fault.kind != "misrouted"
        if poor:
            other = next_command("add", run, task, "--again", "--set", "train.lr_prompt=RATE")
            typer.echo(f"`{other}` tries again with another rate, and so on; `{command('undo', run)}` takes it back.")
        judged = {"faults": [fault.to_json() for fault in faults]}
        return {**result, **judged, "earlier": found.effects_json(), "advised": found.advised_json(), "own": found.own}

    with addition.written():
        sequence.start(
            "run",
            str(run / CONFIG),
            [f"run_dir={_run_dir(run)}", "evaluate.held_out=true"],
            None,
            as_json,
            with_effects,
        )


def undo(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a sequence's run.", autocompletion=completion.runs)
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be taken back, and what of it would be lost.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take back the last `add` of a run, or its last task; what was learned is put aside in RUN/replaced."""
    _change(run, undoing.foretold_undo(run), None if dry_run else lambda: undoing.undo(run), "undone", as_json)


def _change(
    run: Path, foretold: undoing.Undo, do: Callable[[], undoing.Undo | None] | None, name: str, as_json: bool
) -> None:
    """Take a stage back, or bring one back, and evaluate the run; without `do` only say what would be done.

    Args:
        run: the run folder.
        foretold: what is done if nothing changes the run before.
        do: does it, and returns what was done.
        name: of its entry in the result.
        as_json: show the result as JSON.
    """
    if is_distributed():
        raise UserError(
            f"{run} is changed by one process, which starts the ranks of the evaluation itself; expected no launcher."
        )
    found = foretold if do is None else do()
    if found is None:
        raise UserError(f"{foretold.task} of {run} was changed meanwhile; look at the run and try again.")
    typer.echo(f"{'Nothing is changed. Without --dry-run: ' if do is None else ''}{found.sentence(run)}")
    fields = {name: {"task": found.task, "kind": found.kind, "kept": found.aside}}
    if do is None:
        show({"run": str(run), **fields}, as_json)
        return
    try:
        sequence.evaluate(run, as_json, fields)
    except (Interrupted, typer.Exit):
        rest = command("evaluate", run)
        typer.echo(f"{found.task}: that is done; `{rest}` completes the scores. Do not repeat this command.", err=True)
        raise


def _run_dir(run: Path) -> str:
    """The folder as the text of a recipe's run_dir: for YAML `2024` is a number, and braces are filled in."""
    return json.dumps(str(run).replace("{", "{{").replace("}", "}}"), ensure_ascii=False)


def _as_text(text: str) -> str:
    """A value of --set, quoted where YAML would read it as something else than this text."""
    try:
        plain = yaml.safe_load(text) == text
    except yaml.YAMLError:
        plain = False
    return text if plain else json.dumps(text, ensure_ascii=False)
