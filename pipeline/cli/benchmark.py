"""`run`, `train` and `evaluate` of a CLIP benchmark: checks before ranks start, and output after they end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from data_prep.benchmark import prepare_benchmark
from pipeline.cli.lazy import lazy
from pipeline.cli.on_ranks import on_ranks, prints_text
from pipeline.cli.outcome import Result
from pipeline.clip.benchmark.prepared import require_prepared
from pipeline.clip.benchmark.report import terminal_results
from pipeline.clip.recipe import ClipRecipe, load_benchmark
from pipeline.ranks.environment import is_distributed
from pipeline.runs.claim import claim_run
from pipeline.runs.layout import CONFIG, REPORT
from pipeline.tracking.store import passwords_to_environment

if TYPE_CHECKING:
    from pipeline.clip.benchmark import run as running
else:
    running = lazy("pipeline.clip.benchmark.run")  # which a process that only starts the ranks does not need


def start(verb: str, name: str, overrides: list[str], as_json: bool) -> None:
    """`run`, `train` (of a recipe) and `evaluate` (of a run) of a benchmark."""
    recipe = _load(verb, name, overrides)
    if not is_distributed():
        # Checked before ranks are started and load models.
        if recipe.data.prepare_first:
            prepare_benchmark(recipe)
        require_prepared(recipe, name)
        claim_run(recipe)

    def work(found: ClipRecipe) -> Result:
        return running.run_benchmark(found, train=verb != "evaluate", evaluate=verb != "train")

    without_passwords = passwords_to_environment(overrides)
    arguments = [verb, name, *(part for text in without_passwords for part in ("--set", text))]
    on_ranks(arguments, recipe, work, as_json)
    if prints_text(as_json) and verb != "train":
        Console().print(terminal_results(recipe.run_path))
        print(f"report: {recipe.run_path / REPORT}")


def _load(verb: str, name: str, overrides: Iterable[str]) -> ClipRecipe:
    """The recipe of that name; for `evaluate`, the recipe of the run in that folder."""
    if verb == "evaluate":
        recipe = load_benchmark(str(Path(name) / CONFIG))
        return recipe.model_copy(update={"run_dir": name.replace("{", "{{").replace("}", "}}")})
    return load_benchmark(name, overrides)
