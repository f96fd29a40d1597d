"""The command line: the verbs, their options, and how a result or an error is shown. What they do lives elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pipeline import __version__
from pipeline.cli import completion
from pipeline.cli.outcome import LOOK, SHARE, TRAIN, USE, App, Result, Told, finish, show
from pipeline.cli.use import Clip, Learned, Model, Then, add_verbs
from pipeline.config.load import load_recipe, load_run, one_kind, recipe_kind, run_kind
from pipeline.config.recipe import Recipe
from pipeline.errors import EXIT_USER, UserError, require_extras
from pipeline.files.descriptors import raise_descriptor_limit
from pipeline.ranks import launch
from pipeline.ranks.devices import require_usable_gpus
from pipeline.ranks.environment import is_distributed, rank, require_srun
from pipeline.ranks.outcome import OUTCOMES
from pipeline.tracking.store import passwords_to_environment
from pipeline.training.deepspeed_config import accumulation

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
    int | None, typer.Option(min=1, metavar="N", help="Stop after stage N; without it the same command goes on.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on the last line.")]


app = App(help="Continual prompt learning on frozen vision-language models.")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pipeline {__version__}")
        raise typer.Exit


@app.callback()
def _before(
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Continual prompt learning on frozen vision-language models."""
    # The deepspeed launcher puts --local_rank before the verb; the environment says the same, so it is only accepted.
    # DeepSpeed compiles its CPU collectives with the ninja that was installed beside this Python.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # in a log every change of a bar is one more line
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the launcher numbers the ranks in it, torch would take them for GPUs


@app.command(rich_help_panel=TRAIN)
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to plan for; by default those that `run` would start here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check data, model, CLIP, metrics and world size, and plan the memory, before any GPU is touched."""
    if recipe_kind(recipe) == "clip":
        from pipeline.check.clip import check_benchmark

        findings = check_benchmark(recipe, overrides or [], ranks)
    else:
        loaded = load_recipe(recipe, overrides or [])
        from pipeline.check.sequence import check as check_recipe

        findings = check_recipe(loaded, recipe, ranks)
    told = findings.to_json()
    if findings.problems:
        sentence = findings.sentence(recipe)
        if as_json:
            show({**told, "error": sentence, "exit_code": EXIT_USER}, as_json)
        raise (Told if as_json else UserError)(sentence)
    if as_json:
        show(told, as_json)


@app.command(rich_help_panel=TRAIN)
def prepare(
    recipe: RecipeName,
    overrides: Overrides = None,
    skip_bad: SkipBad = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Rewrite prepared data that another recipe or a run depends on.")
    ] = False,
    gpus: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes that compute keys, each on a GPU of its own.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Make the shards and CLIP keys of every task; what is already there and whole is kept."""
    raise_descriptor_limit()
    if recipe_kind(recipe) == "clip":
        if gpus > 1:
            raise UserError(
                f"--gpus is {gpus}, and '{recipe}' is a benchmark, whose preparation computes no keys; leave --gpus "
                "out."
            )
        from pipeline.cli import benchmark as verbs

        show(verbs.prepare(recipe, _with_skip_bad(overrides, skip_bad), replace), as_json)
        return
    loaded = load_recipe(recipe, _with_skip_bad(overrides, skip_bad))
    from data_prep.prepare import prepare as prepare_recipe

    show(
        prepare_recipe(loaded, progress=True, replace=replace, gpus=gpus) or {"prepared": loaded.data.prepared}, as_json
    )


def _add_training(verb: str, does: str) -> None:
    """Add a verb that trains a recipe."""

    @app.command(verb, help=does, rich_help_panel=TRAIN)
    def _(
        recipe: RecipeName,
        overrides: Overrides = None,
        skip_bad: SkipBad = None,
        until: Until = None,
        as_json: AsJson = False,
    ) -> None:
        _sequence(verb, recipe, _with_skip_bad(overrides, skip_bad), until, as_json)


_add_training("run", "Train all stages, evaluate after each, and write the report; a stopped run goes on where it was.")
_add_training("train", "Train all stages without evaluating; `evaluate RUN` fills in the matrix later.")


@app.command(rich_help_panel=TRAIN)
def evaluate(run: RunFolder, as_json: AsJson = False) -> None:
    """Fill in what is missing of a run's accuracy matrix, after every finished stage."""
    require_srun()
    if run_kind(run) == "clip":
        _benchmark("evaluate", str(run), [], as_json)
        return

    def work(recipe: Recipe) -> Result:
        from pipeline.sequence.run import evaluate_run

        return evaluate_run(run)

    _on_ranks(["evaluate", str(run)], load_run(run), work, as_json)
    _show_end(run, "evaluate", str(run), as_json)


@app.command(rich_help_panel=LOOK)
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="The run to report, then others to compare.", autocompletion=completion.runs
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Write RUN/report.html (with the other runs beside it) and print the table."""
    if one_kind(runs) == "clip":
        from pipeline.clip.benchmark.report import read_results, terminal_results, write_benchmark_report

        page = write_benchmark_report(runs[0])
        tables = [terminal_results(run) for run in runs]
        result = {"report": str(page), "results": {str(run): read_results(run)["lines"] for run in runs}}
    else:
        from pipeline.report.page import comparison, terminal_table, write_report

        page = write_report(runs[0], runs[1:])
        tables = [terminal_table(runs)]
        result = {"report": str(page), **comparison(runs)}
    for table in tables:
        Console().print(table)
    show(result, as_json)


@app.command(rich_help_panel=USE)
def predict(
    run: Learned,
    question: Annotated[str, typer.Option(help="What to ask.")],
    image: Annotated[Path | None, typer.Option(help="Picture to ask about; none: only the question routes.")] = None,
    task: Annotated[
        str | None, typer.Option(help="For methods that have to be told the task.", autocompletion=completion.sets)
    ] = None,
    model: Model = None,
    clip: Clip = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question with a run's prompt sets and tell which sets were selected."""
    from pipeline.adapter.predict import predict as predict_one

    show(predict_one(run, image, question, task, model, clip), as_json)


@app.command(rich_help_panel=SHARE)
def export(
    run: RunFolder,
    target: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the adapter.")],
    licence: Annotated[
        str | None,
        typer.Option("--licence", "--license", help="Licence of the prompt sets, for the model card."),
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Upload it to the hub too.")] = None,
    public: Annotated[bool, typer.Option(help="Let everybody see the repository that --push makes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write the learned pool of all stages as one portable adapter."""
    from pipeline.adapter.load import export as export_run

    result = export_run(run, target, licence)
    if push is not None:
        from pipeline.adapter.edit import push as push_adapter

        result["pushed"] = push_adapter(target, push, public)
    show(result, as_json)


add_verbs(
    app,
    lambda recipe, overrides, as_json, then: _sequence("run", recipe, overrides, None, as_json, then),
)


def main() -> None:
    """Run the command line."""
    launch.end_as_rank(lambda: app(prog_name="pipeline"))


def _with_skip_bad(overrides: list[str] | None, skip_bad: int | None) -> list[str]:
    return [*(overrides or []), *([] if skip_bad is None else [f"data.skip_bad={skip_bad}"])]


def _benchmark(verb: str, name: str, overrides: list[str], as_json: bool) -> None:
    """`run`, `train` (of a recipe) and `evaluate` (of a run) of a benchmark."""
    from pipeline.cli import benchmark as verbs

    recipe = verbs.load(verb, name, overrides)
    if not is_distributed():
        verbs.before_ranks(recipe, name)
    told = passwords_to_environment(overrides)
    arguments = [verb, name, *(part for text in told for part in ("--set", text))]
    _on_ranks(arguments, recipe, lambda found: verbs.work(verb, found), as_json)
    if _may_print(as_json) and verb != "train":
        from pipeline.clip.benchmark.report import REPORT, terminal_results

        Console().print(terminal_results(recipe.run_path))
        print(f"report: {recipe.run_path / REPORT}")


def _sequence(
    verb: str, name: str, overrides: list[str], until: int | None, as_json: bool, then: Then | None = None
) -> None:
    require_srun()
    if recipe_kind(name) == "clip":
        if until is not None:
            raise UserError(f"--until counts the stages of a sequence, and {name} has units; choose them with --set.")
        _benchmark(verb, name, overrides, as_json)
        return
    recipe = load_recipe(name, overrides)
    require_extras("train", *recipe.tracking.extras, *(["report"] if verb != "train" else []))
    from pipeline.sequence.prepared import require_prepared

    if recipe.data.prepare_first and not is_distributed():
        from data_prep.prepare import prepare as prepare_recipe

        prepare_recipe(recipe, progress=True)
    require_prepared(recipe, name)
    if not is_distributed():
        # Said here, before ranks have started and loaded anything.
        accumulation(recipe, launch.local_processes(recipe.train.processes))
        from pipeline.runs.claim import claim_run

        claim_run(recipe)

    def work(recipe: Recipe) -> Result:
        from pipeline.sequence.run import run_sequence

        return run_sequence(recipe, stages="train" if verb == "train" else None, until=until)

    told = passwords_to_environment(overrides)
    arguments = [verb, name, *(part for text in told for part in ("--set", text))]
    _on_ranks([*arguments, *(["--until", str(until)] if until else [])], recipe, work, as_json, then)
    if then is None:  # `add` has its own last words
        _show_end(recipe.run_path, verb, name, as_json)


def _may_print(as_json: bool) -> bool:
    """Whether this process is the one whose output the user sees, and wants words."""
    return not as_json and OUTCOMES not in os.environ and rank() == 0


def _show_end(run: Path, verb: str, name: str, as_json: bool) -> None:
    if _may_print(as_json):
        from pipeline.report.summary import show_end

        show_end(run, verb, name)


def _on_ranks(
    arguments: list[str], recipe: Any, work: Callable[[Any], Result], as_json: bool, then: Then | None = None
) -> None:
    """Do `work` here when this process is a rank or the only one, else on ranks started for it.

    The result is handed to `then` before it is shown.
    """
    if is_distributed():
        result = work(recipe)
    else:
        require_extras("train", *recipe.tracking.extras)
        require_usable_gpus()  # said once, before ranks are started
        processes = launch.local_processes(recipe.train.processes)
        if processes > 1:
            outcome = launch.launch(arguments, processes)
            if outcome.code:
                finish(outcome, as_json)
            result = outcome.result or {}
        else:
            result = work(recipe)
    if then is not None and rank() == 0:
        result = then(result)
    show(result, as_json)
