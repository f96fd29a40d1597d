"""The verbs `check`, `prepare`, `run`, `train` and `evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import sequence
from pipeline.cli.labelling import Port, until_labelled
from pipeline.cli.lazy import lazy
from pipeline.cli.options import AsJson, Overrides, RecipeName, RunFolder, SkipBad, Until
from pipeline.cli.outcome import ReportedError, show
from pipeline.config.kinds import recipe_kind, run_kind
from pipeline.errors import EXIT_USER, UserError
from pipeline.files.descriptors import raise_descriptor_limit
from pipeline.ranks.environment import require_srun

if TYPE_CHECKING:
    from data_prep import benchmark as prepare_clip
    from data_prep import prepare as prepare_sequence
    from pipeline.check import clip as check_clip
    from pipeline.check import sequence as check_sequence
    from pipeline.cli import benchmark
    from pipeline.clip import recipe as clip_recipe
    from pipeline.config import load as recipes
else:
    prepare_clip, prepare_sequence = lazy("data_prep.benchmark"), lazy("data_prep.prepare")
    check_clip, check_sequence = lazy("pipeline.check.clip"), lazy("pipeline.check.sequence")
    benchmark, clip_recipe = lazy("pipeline.cli.benchmark"), lazy("pipeline.clip.recipe")
    recipes = lazy("pipeline.config.load")


def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Ranks to plan for, one per GPU; by default those that `run` would start here."),
    ] = None,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            min=1, metavar="GB", help="Plan for one GPU of so many GB (or --ranks of them), which may not be here."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check data, model, CLIP, metrics and world size, and plan the memory, before any GPU is touched."""
    if recipe_kind(recipe) == "clip":
        findings = check_clip.check_benchmark(recipe, overrides or [], ranks, gpu_memory)
    else:
        loaded = recipes.load_recipe(recipe, overrides or [])  # before heavy imports, so that its errors appear at once
        findings = check_sequence.check(loaded, recipe, ranks, gpu_memory)
    report = findings.to_json()
    if findings.problems:
        sentence = findings.sentence(recipe)
        if as_json:
            show({**report, "error": sentence, "exit_code": EXIT_USER}, as_json)
        raise (ReportedError if as_json else UserError)(sentence)
    if as_json:
        show(report, as_json)


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
    """Write the shards and CLIP keys of every task; complete ones are kept."""
    raise_descriptor_limit()
    if recipe_kind(recipe) == "clip":
        if gpus > 1:
            raise UserError(
                f"--gpus is {gpus}, and '{recipe}' is a benchmark, whose preparation computes no keys; leave --gpus "
                "out."
            )
        benchmark_recipe = clip_recipe.load_benchmark(recipe, _with_skip_bad(overrides, skip_bad))
        show(prepare_clip.prepare_benchmark(benchmark_recipe, replace=replace), as_json)
        return
    loaded = recipes.load_recipe(recipe, _with_skip_bad(overrides, skip_bad))
    prepared = prepare_sequence.prepare(loaded, progress=True, replace=replace, gpus=gpus)
    show(prepared or {"prepared": loaded.data.prepared}, as_json)


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    skip_bad: SkipBad = None,
    until: Until = None,
    label: Annotated[
        bool, typer.Option("--label", help="Serve a page to label the images that a round of protocol active asks for.")
    ] = False,
    port: Port = 8000,
    as_json: AsJson = False,
) -> None:
    """Train all stages, evaluate after each, and write the report; a stopped run resumes where it was."""
    given = _with_skip_bad(overrides, skip_bad)
    if not label:
        _start("run", recipe, given, until, as_json)
        return
    asked = clip_recipe.load_benchmark(recipe, given) if recipe_kind(recipe) == "clip" else None
    if asked is None or asked.active is None or asked.active.oracle != "file":
        raise UserError(
            f"--label serves a page to a person, and '{recipe}' asks nobody; set active.oracle to file in a recipe of "
            "protocol active, or leave --label out."
        )
    until_labelled(lambda: _start("run", recipe, given, until, as_json), asked.run_path, port)


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    skip_bad: SkipBad = None,
    until: Until = None,
    as_json: AsJson = False,
) -> None:
    """Train all stages without evaluating; `evaluate RUN` fills in the matrix later."""
    _start("train", recipe, _with_skip_bad(overrides, skip_bad), until, as_json)


def evaluate(run: RunFolder, as_json: AsJson = False) -> None:
    """Compute the missing cells of a run's accuracy matrix, for every finished stage."""
    require_srun()
    if run_kind(run) == "clip":
        benchmark.start("evaluate", str(run), [], as_json)
    else:
        sequence.evaluate(run, as_json)


def _start(verb: str, name: str, overrides: list[str], until: int | None, as_json: bool) -> None:
    """Train a recipe of either kind."""
    require_srun()
    if recipe_kind(name) != "clip":
        sequence.start(verb, name, overrides, until, as_json)
        return
    if until is not None:
        raise UserError(f"--until counts the stages of a sequence, and {name} has units; choose them with --set.")
    benchmark.start(verb, name, overrides, as_json)


def _with_skip_bad(overrides: list[str] | None, skip_bad: int | None) -> list[str]:
    return [*(overrides or []), *([] if skip_bad is None else [f"data.skip_bad={skip_bad}"])]
