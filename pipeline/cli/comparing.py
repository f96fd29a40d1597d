"""The verb `compare`: several methods on one recipe, at equal settings, as one page and one table."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli import completion
from pipeline.cli.lazy import lazy
from pipeline.cli.on_ranks import prints_text
from pipeline.cli.options import AsJson, Overrides, RecipeName
from pipeline.cli.outcome import show
from pipeline.console.log import log_to_terminal
from pipeline.errors import Interrupted, UserError, require_extras
from pipeline.files.passwords import masked
from pipeline.ranks.environment import is_distributed, require_srun
from pipeline.tracking.store import STORE_VARIABLE, passwords_to_environment

if TYPE_CHECKING:
    from data_prep import prepare as preparing
    from pipeline.config import compared as configured
    from pipeline.planning import budget
    from pipeline.report import compared, compared_page
    from pipeline.runs import folder as run_folder
    from pipeline.sequence import compare as comparing
    from pipeline.tracking import comparison as tracked
else:
    preparing, budget = lazy("data_prep.prepare"), lazy("pipeline.planning.budget")
    configured = lazy("pipeline.config.compared")
    compared, compared_page = lazy("pipeline.report.compared"), lazy("pipeline.report.compared_page")
    run_folder, comparing = lazy("pipeline.runs.folder"), lazy("pipeline.sequence.compare")
    tracked = lazy("pipeline.tracking.comparison")

Listed = Annotated[
    str | None,
    typer.Option(
        metavar="A,B,..",
        help="Methods, or names in the recipe's comparison.methods; without it all that are there.",
        autocompletion=completion.methods,
    ),
]
Seeds = Annotated[
    str | None, typer.Option(metavar="0,1,..", help="Seeds; without it the comparison's or the recipe's.")
]
Jobs = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Runs at once; by default one, or as many as the GPUs hold."),
]
ShareOf = Annotated[
    str | None,
    typer.Option(metavar="I/N", help="Run every N-th run from the I-th on, and write no page: a job of an array."),
]


def compare(
    recipe: RecipeName,
    methods: Listed = None,
    seeds: Seeds = None,
    overrides: Overrides = None,
    jobs: Jobs = None,
    share: ShareOf = None,
    only_page: Annotated[
        bool, typer.Option("--only-page", help="Run nothing: write the page of the runs that are done.")
    ] = False,
    count: Annotated[bool, typer.Option("--count", help="Print the number of runs, and do nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of page and tables; by default beside the runs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run several methods with several seeds on one recipe, as far as missing, and compare them on one page."""
    require_srun()
    if is_distributed():
        raise UserError("compare starts the ranks of its runs itself; expected one process, without a launcher.")
    chosen = configured.load_comparison(recipe, overrides or [], _names(methods), _numbers(seeds))
    if count:
        print(len(chosen.runs))
        return
    require_extras("train", *chosen.recipe.tracking.extras, "report")
    log_to_terminal()
    part = comparing.Share.read(share)
    failed: Mapping[str, comparing.Failure]
    _keep_password(chosen, overrides or [])
    comparison = comparing.sized(chosen, budget.within_budget)
    folder = out or comparison.folder
    data = comparison.recipe.data
    if (data.prepare_first or data.drawn) and not only_page:  # drawn data needs no source; complete splits are kept
        preparing.prepare(comparison.recipe, progress=True)
    comparing.require_comparable(comparison, recipe)
    if share is not None:
        failed = comparing.run_missing(comparison, folder, jobs, part, lambda _: None)
        if failed:
            raise comparing.RunsFailed.of(failed, len(part.taken(comparison.runs)) - len(failed), recipe)
        return
    tracking = comparison.recipe.tracking
    parent = tracked.ComparisonRun.opened(tracking, comparison.recipe.name, folder.resolve().name, folder)
    status = "FAILED"
    try:
        failed = {}
        if not only_page:
            adopt = (lambda run: parent.adopt(run.recipe.run_path)) if parent is not None else (lambda _: None)
            failed = comparing.run_missing(comparison, folder, jobs, part, adopt)
        result = _written(comparison, folder, failed, parent)
        status = "FAILED" if failed else "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        if parent is not None:
            parent.close(status)
    if prints_text(as_json):
        print((folder / compared_page.MARKDOWN).read_text("utf-8"))
        print(f"page: {folder / 'report.html'}")
    if failed:
        done = sum(map(comparing.is_done, comparison.runs))
        raise comparing.RunsFailed.of(failed, done, recipe, folder / "report.html")
    if as_json:
        show(result, as_json)


def _written(
    comparison: configured.Comparison,
    folder: Path,
    failed: Mapping[str, comparing.Failure],
    parent: tracked.ComparisonRun | None,
) -> dict[str, Any]:
    """Write page and tables of the runs that are done; returns the last line of --json."""
    methods, missing = [], [f"{title}: {failure.why}" for title, failure in failed.items()]
    for label in comparison.labels:
        done = [run for run in comparison.of(label) if comparing.is_done(run)]
        if done:
            methods.append(compared.ComparedMethod(label, [run_folder.read_run(run.recipe.run_path) for run in done]))
        missing += [run.title for run in comparison.of(label) if run not in done and run.title not in failed]
    if not methods and failed:
        raise comparing.RunsFailed.of(failed, 0, comparison.recipe.name)
    if not methods:
        raise UserError("None of the runs is done, so there is nothing to compare.")
    page = compared_page.write_comparison(folder, comparison.recipe.name, methods, _facts(comparison), missing)
    if parent is not None:
        for run in comparison.runs:
            parent.adopt(run.recipe.run_path)
        numbers = {
            f"{method.label}.{column.title.replace(' ', '_')}": compared.first(method.spread(column))
            for method in methods
            for column in compared.COLUMNS
        }
        files = [page, *(folder / name for name in (compared_page.JSON, compared_page.MARKDOWN, compared_page.CSV))]
        parent.results(numbers, _facts(comparison), files)
    return {**compared.headline(methods), **({"missing": missing} if missing else {})}


def _facts(comparison: configured.Comparison) -> dict[str, str]:
    """What holds for all runs of a comparison."""
    recipe = comparison.recipe
    train = recipe.train
    return {
        "recipe": recipe.name,
        "model": recipe.model.path,
        "methods": ", ".join(comparison.labels),
        "seeds": ", ".join(map(str, comparison.seeds)),
        "budget": f"{train.budget:,} trained parameters per stage" if train.budget else "none: each method's own size",
        "layers of low-rank updates": ", ".join(recipe.comparison.targets or ("each method's own, which are equal",)),
        "stage": f"{train.steps} steps" if train.steps else f"{train.epochs:g} epochs",
        "batch": str(train.global_batch),
        "projector": train.projector,
        "keys": f"{recipe.keys.path}, {recipe.keys.text_feature} text",
        "scoring": recipe.data.scoring,
    }


def _keep_password(comparison: configured.Comparison, overrides: list[str]) -> None:
    """Hand a password in tracking.uri to the runs by the environment: the files of their recipes must not have it."""
    passwords_to_environment(overrides)
    uri = comparison.recipe.tracking.uri
    if uri and masked(uri) != uri:
        os.environ[STORE_VARIABLE] = uri


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _numbers(text: str | None) -> list[int]:
    found = _names(text)
    if not all(number.isdecimal() for number in found):
        raise UserError(f"--seeds is '{text}'; expected whole numbers from 0 with commas between them, such as 0,1,2.")
    return [int(number) for number in found]
