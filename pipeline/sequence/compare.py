"""Runs what is missing of a comparison, each run a process of its own and a run folder as any other."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config.compared import ComparedRun, Comparison
from pipeline.config.recipe import Recipe
from pipeline.errors import EXIT_FAILURE, EXIT_RESUMABLE, EXIT_USER, Interrupted, PipelineError, UserError, UserErrors
from pipeline.files.paths import command
from pipeline.ranks.launch import local_processes
from pipeline.ranks.side_by_side import Command, Ended, SideBySide, shared_places
from pipeline.runs.claim import claim_run, is_empty
from pipeline.runs.state import read_state
from pipeline.sequence.follow import FollowedLog
from pipeline.sequence.opened import require_fitting
from pipeline.sequence.prepared import require_prepared

log = logging.getLogger(__name__)
RECIPES, LOGS = "recipes", "logs"  # in the comparison's folder


@dataclass(frozen=True)
class Failure:
    """Why a run of a comparison is not done, with the file of its output, and the exit code that it ended with."""

    why: str
    code: int


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
) -> dict[str, Failure]:
    """Run what is missing of the comparison's share, all of it; returns what failed, by the runs' titles.

    A run that stopped early by itself (exit code 75) is among the failures: the others go on meanwhile.

    Args:
        comparison: the runs.
        folder: of the comparison, for the runs' recipes and what they print.
        jobs: runs at once; None: as many as the GPUs hold where `train.processes` says what one takes, else one.
        share: the runs that this process takes.
        finished: called after every run that succeeded.

    Raises:
        Interrupted: a signal asked to stop; the runs' states are saved. The message lists what had failed by then.
    """
    missing = [run for run in share.taken(comparison.runs) if not is_done(run)]
    if not missing:
        return {}
    ranks = local_processes(comparison.recipe.train.processes)
    places = _places(jobs, comparison.recipe.train.processes, ranks)
    by_title = {run.title: run for run in missing}
    commands = [_command(run, folder) for run in missing]
    failed: dict[str, Failure] = {}
    followed = {command.title: FollowedLog(command.log) for command in commands}

    def began(command: Command) -> None:
        number = commands.index(command) + 1
        log.info("run %d of %d, %s: begins; it writes %s", number, len(commands), command.title, command.log)

    def tell(command: Command, last: bool = False) -> None:
        for line in followed[command.title].news(last):
            log.info("%s: %s", command.title, line)

    def ended(end: Ended) -> None:
        run = by_title[end.command.title]
        tell(end.command, last=True)
        if end.code == 0 and is_done(run):
            log.info("%s: done", run.title)
            finished(run)
        elif not (side.stopped and end.code in (EXIT_RESUMABLE, -signal.SIGTERM)):  # -SIGTERM: at its very start
            why = end.error or _ended_by(end.code)
            failed[run.title] = Failure(f"{why.rstrip('.')}. Its output is in {end.command.log}.", end.code)
            log.error("%s failed: %s", run.title, failed[run.title].why)

    def waits(running: Sequence[Command]) -> None:
        for one in running:
            tell(one)

    side = SideBySide(places, began, ended, waits)
    side.run(commands)
    if side.stopped:
        told = f" {len(failed)} had failed before:\n{_listed(failed)}" if failed else ""
        raise Interrupted(f"Stopped before all runs were done. Run the same command again to resume.{told}")
    return failed


def _ended_by(code: int) -> str:
    """How a run ended that said nothing: a negative code is that of the signal by which it was killed."""
    if code < 0:
        return f"it was killed by signal {-code}" + (", as where memory runs out" if code == -signal.SIGKILL else "")
    return f"it ended with exit code {code}"


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
    """Some runs of a comparison are not done; the message says which, and why.

    The exit code is 1, or where all have it, that of wrong input (2) or of a run that stopped early (75).
    """

    @classmethod
    def of(cls, failed: Mapping[str, Failure], done: int, name: str, page: Path | None = None) -> RunsFailed:
        """The error for these failures beside so many finished runs, which are on the page."""
        shown = f" The others are done, and {page} shows them alone." if page is not None else ""
        error = cls(
            f"{len(failed)} of {done + len(failed)} runs failed.{shown} `{command('compare', name)}` with the same "
            f"options runs these again:\n{_listed(failed)}"
        )
        codes = {failure.code for failure in failed.values()}
        alike = next((code for code in (EXIT_USER, EXIT_RESUMABLE) if codes == {code}), None)
        error.exit_code = EXIT_FAILURE if alike is None else alike
        return error


def _listed(failed: Mapping[str, Failure]) -> str:
    return "\n".join(f"- {title}: {failure.why}" for title, failure in failed.items())
