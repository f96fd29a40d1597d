"""`run`, `train` and `evaluate` of a task sequence: checks before ranks start, and output after they end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cli.lazy import lazy
from pipeline.cli.on_ranks import Then, on_ranks, prints_text
from pipeline.cli.outcome import Result
from pipeline.errors import require_extras
from pipeline.ranks import launch
from pipeline.ranks.environment import is_distributed, require_srun
from pipeline.tracking.store import passwords_to_environment

if TYPE_CHECKING:
    from data_prep import prepare as preparing
    from pipeline.config import load as recipes
    from pipeline.hub import snapshots
    from pipeline.planning import budget
    from pipeline.report import summary
    from pipeline.runs import claim
    from pipeline.runs import folder as folders
    from pipeline.sequence import prepared, verdict
    from pipeline.sequence import run as running
    from pipeline.training import deepspeed_config
else:
    preparing, recipes, snapshots, budget, summary, claim, folders, prepared, running, verdict, deepspeed_config = map(
        lazy,
        (
            "data_prep.prepare",
            "pipeline.config.load",
            "pipeline.hub.snapshots",
            "pipeline.planning.budget",
            "pipeline.report.summary",
            "pipeline.runs.claim",
            "pipeline.runs.folder",
            "pipeline.sequence.prepared",
            "pipeline.sequence.run",
            "pipeline.sequence.verdict",
            "pipeline.training.deepspeed_config",
        ),
    )


def start(
    verb: str, name: str, overrides: list[str], until: int | None, as_json: bool, then: Then | None = None
) -> None:
    """Train the recipe of that name, for the verb `run` with evaluation.

    Args:
        verb: run or train.
        name: name or path of the recipe.
        overrides: values of --set.
        until: stop after this stage; None: train all.
        as_json: show the result as JSON.
        then: changes the result before it is shown, and prints what is wrong with the tasks itself.
    """
    require_srun()
    recipe = recipes.load_recipe(name, overrides)
    if recipe.train.budget is not None:
        recipe = budget.within_budget(recipe)
    require_extras("train", *recipe.tracking.extras, *(["report"] if verb != "train" else []))
    if recipe.data.prepare_first and not is_distributed():
        # Without weights yet: a model that cannot be had is missed before data is prepared, which may take hours.
        snapshots.settings_folder(snapshots.Source(recipe.model.location, recipe.model.revision))
        preparing.prepare(recipe, progress=True)
    prepared.require_prepared(recipe.data, name)
    if not is_distributed():
        # Checked before ranks are started and load models.
        deepspeed_config.accumulation(recipe.train, launch.local_processes(recipe.train.processes))
        claim.claim_run(recipe)

    def work(recipe: recipes.Recipe) -> Result:
        return running.run_sequence(recipe, stages="train" if verb == "train" else None, until=until)

    without_passwords = passwords_to_environment(overrides)
    arguments = [verb, name, *(part for text in without_passwords for part in ("--set", text))]
    end = _End(recipe.run_path)
    judged = end if then is None and verb != "train" else None
    on_ranks([*arguments, *(["--until", str(until)] if until else [])], recipe, work, as_json, then or judged)
    end.show(verb, name, as_json)


def evaluate(run: Path, as_json: bool, further: Mapping[str, Any] | None = None) -> None:
    """Compute the missing cells of a run's accuracy matrix; `further` is added to the result."""
    require_extras("report")

    def work(recipe: recipes.Recipe) -> Result:
        return running.evaluate_run(run)

    end = _End(run)

    def told(result: Result) -> Result:
        return {**end(result), **(further or {})}

    on_ranks(["evaluate", str(run)], recipes.load_run(run), work, as_json, told)
    end.show("evaluate", str(run), as_json)


@dataclass
class _End:
    """The end of a run: what is wrong with its tasks, for the result and for the terminal."""

    run: Path
    wrong: list[str] = field(default_factory=list)

    def __call__(self, result: Result) -> Result:
        """The result with the faults of the tasks."""
        faults = verdict.faults_of(folders.read_run(self.run), recipes.load_run(self.run))
        self.wrong = [fault.sentence for fault in faults]
        return {**result, "faults": [fault.to_json() for fault in faults]}

    def show(self, verb: str, name: str, as_json: bool) -> None:
        """Print the summary of a run, with what is wrong."""
        if prints_text(as_json):
            summary.show_end(self.run, verb, name, self.wrong)
