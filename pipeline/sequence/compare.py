"""Runs what is missing of a comparison, each run a process of its own and a run folder as any other."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.compared import ComparedRun, Comparison
from pipeline.config.recipe import Recipe
from pipeline.errors import Interrupted, PipelineError, UserError, UserErrors
from pipeline.files.paths import command
from pipeline.ranks.launch import local_processes
from pipeline.ranks.side_by_side import Command, Ended, SideBySide, shared_places
from pipeline.runs.claim import claim_run, is_empty
from pipeline.runs.state import read_state
from pipeline.sequence.opened import require_fitting
from pipeline.sequence.prepared import require_prepared

log = logging.getLogger(__name__)
RECIPES, LOGS = "recipes", "logs"  # in the comparison's folder


@dataclass(frozen=True)
class Share:
    """The part of a comparison's runs that one process takes: every `of`-th one from number `number` (from 1) on."""

    number: int = 1
    of: int = 1

    @classmethod
    def read(cls, text: str | None) -> Share:
        """From the command line, `2/8`; UserError for anything else."""
        if text is None:
            return cls()
        found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
        if found is None or int(found[1]) > int(found[2]):
            raise UserError(f"--share is '{text}'; expected NUMBER/OF, such as 2/8, with a number from 1 to OF.")
        return cls(int(found[1]), int(found[2]))

    def taken(self, runs: Sequence[ComparedRun]) -> list[ComparedRun]:
        """These runs."""
        return list(runs[self.number - 1 :: self.of])


def sized(comparison: Comparison, fitted: Callable[[Recipe], Recipe]) -> Comparison:
    """The comparison with what each recipe's budget comes to; UserErrors where a method cannot have it."""
    found, wrong = list[ComparedRun](), dict[str, str]()
    for run in comparison.runs:
        try:
            found.append(dataclasses.replace(run, recipe=fitted(run.recipe)))
        except UserError as error:
            wrong[run.label] = f"{run.label}: {error}"
    if wrong:
        raise UserErrors(wrong.values())
    return dataclasses.replace(comparison, runs=tuple(found))


def require_comparable(comparison: Comparison, name: str) -> None:
    """Raise UserErrors for everything that would end a run at its start, before anything is trained.

    These are data that is not prepared, a method whose router, rule or evaluation do not go together, and a run folder
    of another recipe.
    """
    require_prepared(comparison.recipe.data, name)
    wrong: dict[str, str] = {}
    for run in comparison.runs:
        try:
            require_fitting(run.recipe)
            path = run.recipe.run_path
            if path.exists() and not is_empty(path):
                claim_run(run.recipe)  # it writes nothing into a folder that is a run
        except UserError as error:
            wrong.setdefault(str(error), f"{run.title}: {error}")
    if wrong:
        raise UserErrors(wrong.values())


def is_done(run: ComparedRun) -> bool:
    """Whether a run is finished and evaluated."""
    return read_state(run.recipe.run_path).get("status") == "done"


def run_missing(
    comparison: Comparison, folder: Path, jobs: int | None, share: Share, finished: Callable[[ComparedRun], object]
) -> dict[str, str]:
    """Run what is missing of the comparison's share; returns what failed: the run's title and why.

    Args:
        comparison: the runs.
        folder: of the comparison, for the runs' recipes and what they print.
        jobs: runs at once; None: as many as the GPUs hold where `train.processes` says what one takes, else one.
        share: the runs that this process takes.
        finished: called after every run that succeeded.

    Raises:
        Interrupted: a signal asked to stop; the runs' states are saved.
    """
    missing = [run for run in share.taken(comparison.runs) if not is_done(run)]
    if not missing:
        return {}
    ranks = local_processes(comparison.recipe.train.processes)
    places = _places(jobs, comparison.recipe.train.processes, ranks)
    by_title = {run.title: run for run in missing}
    commands = [_command(run, folder) for run in missing]
    failed: dict[str, str] = {}

    def began(command: Command) -> None:
        number = commands.index(command) + 1
        log.info("run %d of %d, %s: begins; it writes %s", number, len(commands), command.title, command.log)

    def ended(end: Ended) -> None:
        run = by_title[end.command.title]
        if end.code == 0 and is_done(run):
            log.info("%s: done", run.title)
            finished(run)
        elif end.code != Interrupted.exit_code:
            why = end.error or f"it ended with exit code {end.code}"
            failed[run.title] = f"{why.rstrip('.')}. Its output is in {end.command.log}."
            log.error("%s failed: %s", run.title, failed[run.title])

    side = SideBySide(places, began, ended)
    ends = side.run(commands)
    if side.stopped or any(end.code == Interrupted.exit_code for end in ends):
        raise Interrupted("Stopped before all runs were done. Run the same command again to resume.")
    return failed


def _places(jobs: int | None, processes: int | None, ranks: int) -> list[dict[str, str]]:
    devices = _devices()
    if jobs is None:
        jobs = max(1, len(devices) // processes) if devices and processes else 1
    if devices and jobs > len(devices):
        raise UserError(f"--jobs is {jobs}, and {len(devices)} GPUs are visible; expected at most one run for each.")
    return shared_places(jobs, ranks, devices)


def _devices() -> list[str]:
    """The visible GPUs, as CUDA_VISIBLE_DEVICES names them."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in named.split(",") if name.strip()]
    return names[:count] if len(names) >= count else [str(number) for number in range(count)]


def _command(run: ComparedRun, folder: Path) -> Command:
    recipe = folder / RECIPES / f"{run.title}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    run.recipe.dump_yaml(recipe)
    return Command(run.title, ["run", str(recipe), "--json"], folder / LOGS / f"{run.title}.log")


class RunsFailed(PipelineError):
    """Some runs of a comparison failed; the message says which. The others are done."""

    @classmethod
    def of(cls, failed: dict[str, str], done: int, name: str) -> RunsFailed:
        """The error for these failures beside so many finished runs."""
        listed = "\n".join(f"- {title}: {why}" for title, why in failed.items())
        return cls(
            f"{len(failed)} of {done + len(failed)} runs failed; the others are done and on the page. "
            f"`{command('compare', name)}` with the same options runs these again:\n{listed}"
        )
