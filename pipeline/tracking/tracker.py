"""MLflow tracking: one parent run per sequence, one child run per stage, prompt sets as LoggedModels.

Only rank 0 tracks; the other ranks and `tracking.enabled=false` get a NullTracker with the same methods. A store that
cannot be reached at the start is the user's to mend (UserError); once training runs, a failing store costs a warning
and nothing else: metrics wait in memory and are sent when the store answers again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import UserError
from pipeline.files.passwords import is_masked, masked

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.config.recipe import Recipe
    from pipeline.console.progress import Progress
    from pipeline.data.collate import MicroBatches


DEFAULT_STORE = "mlflow.db"
STORE_VARIABLE = "MLFLOW_TRACKING_URI"
ARTIFACTS = "mlartifacts"


def never(_: bool) -> bool:
    """Of a run that is not finished: whatever ends the call is what the run ends with."""
    return False


class Tracker(Protocol):
    """What the sequence and the training loop tell about a run."""

    def sequence(
        self, state: Mapping[str, Any], stays_finished: Callable[[bool], bool] = never
    ) -> AbstractContextManager[None]:
        """Open the parent run; `state` is the content of run.json, whose "mlflow" entry names the runs to continue.

        `stays_finished` says, whether a stop (True) or an error ends the call now, that the run was finished before and
        is so still: its parent run then keeps its end, and its numbers those of the matrix.
        """

    def stage(self, index: int, name: str) -> AbstractContextManager[None]:
        """Open the child run of one stage (index is 0-based); inside, everything below goes to this run."""

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        """Log numbers of one step; entries that are None are left out."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Log facts that are known only while running, such as parameter counts; a name is logged once."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or the files of a folder."""

    def stage_model(self, folder: Path, name: str, metrics: Mapping[str, float | None]) -> None:
        """Register a stage checkpoint as a LoggedModel that can be searched by its metrics."""

    def model_metrics(self, name: str, metrics: Mapping[str, float | None], step: int) -> None:
        """Add numbers, such as the scores after its stage, to the LoggedModel that `stage_model` registered."""

    def results(self, run_path: Path, complete: bool) -> None:
        """Upload report, matrix, figures and a sample of the predictions; register the adapter of a complete run."""

    def run_ids(self) -> dict[str, Any]:
        """Return what must stand in run.json under "mlflow" so that a restart continues the same runs."""


class NullTracker:
    """Tracks nothing."""

    @contextmanager
    def sequence(self, state: Mapping[str, Any], stays_finished: Callable[[bool], bool] = never) -> Iterator[None]:
        yield

    @contextmanager
    def stage(self, index: int, name: str) -> Iterator[None]:
        yield

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        pass

    def params(self, values: Mapping[str, Any]) -> None:
        pass

    def artifact(self, path: Path, folder: str | None = None) -> None:
        pass

    def stage_model(self, folder: Path, name: str, metrics: Mapping[str, float | None]) -> None:
        pass

    def model_metrics(self, name: str, metrics: Mapping[str, float | None], step: int) -> None:
        pass

    def results(self, run_path: Path, complete: bool) -> None:
        pass

    def run_ids(self) -> dict[str, Any]:
        return {}


def set_shares(selected: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Percent of a stage's training samples that get each earlier set; `selected` [N, m] numbers of `names`."""
    shares = [100.0 * float((selected == number).any(1).float().mean()) for number in range(len(names))]
    return {f"routing_share.{name}": share for name, share in zip(names, shares, strict=True)}


class StepNumbers:
    """What is tracked of a step: its line in metrics.jsonl, this rank's memory in GiB (the peak on an accelerator, what
    the process holds otherwise), and the percent of the global batches since the line before that got each earlier set.

    Sets that no sample of the stage gets are left out. Nothing is asked of other ranks: the order says who was where.
    """

    def __init__(self, batches: MicroBatches, names: Sequence[str], start: int = 0) -> None:
        self.batches, self.done = batches, start
        used = [number for number in batches.selected.unique().tolist() if number >= 0]
        self.names = {number: names[number] for number in used}

    def __call__(self, progress: Progress) -> dict[str, float]:
        numbers = {**progress.numbers(), "memory_gib": _memory_gib()}
        if self.names:
            selected = self.batches.selected[self.batches.samples_of(range(self.done, progress.step))]
            for number, name in self.names.items():
                numbers[f"routing_share_of_step.{name}"] = 100.0 * float((selected == number).any(1).float().mean())
        self.done = progress.step
        return numbers


def _memory_gib() -> float:
    import psutil
    import torch

    on_device = torch.cuda.is_available()
    used = torch.cuda.max_memory_allocated() if on_device else psutil.Process().memory_info().rss
    return round(used / 2**30, 3)


def make_tracker(recipe: Recipe, run_path: Path, rank: int) -> Tracker:
    """Return an MlflowTracker on rank 0 when the recipe tracks, otherwise a NullTracker.

    Raises UserError when the tracking store cannot be reached.
    """
    if rank != 0 or not recipe.tracking.enabled:
        return NullTracker()
    from pipeline.tracking.mlflow_tracker import MlflowTracker

    return MlflowTracker(recipe, run_path)


def tracking_uri(configured: str | None) -> str:
    """Return the store to use: the recipe's, MLFLOW_TRACKING_URI, or sqlite in the current folder (made absolute).

    A run folder's config.yaml holds the recipe's address without its password; the whole one is then expected in
    MLFLOW_TRACKING_URI. Raises UserError where it is not there, and for a database in a folder that does not exist.
    """
    told = os.environ.get(STORE_VARIABLE)
    uri = configured or told or f"sqlite:///{DEFAULT_STORE}"
    if configured and is_masked(configured):
        if told is None or masked(told) != configured:
            raise UserError(
                f"tracking.uri is {configured}, whose password is not kept in run folders; set {STORE_VARIABLE} to the "
                "whole address, or tracking.uri, or tracking.enabled=false."
            )
        uri = told
    database = _sqlite_path(uri)
    if database is None:
        return uri
    database = database.absolute()  # the working folder may change later
    if not database.parent.is_dir():
        raise UserError(f"The folder of the MLflow database {database} does not exist; create it or set tracking.uri.")
    return f"sqlite:///{database}"


def passwords_to_environment(overrides: Sequence[str]) -> list[str]:
    """Return the overrides without the password of `tracking.uri`, which goes to MLFLOW_TRACKING_URI instead.

    For the processes that a launcher starts: arguments of a process are seen by all users of a machine, and the
    launcher prints them when a process fails.
    """
    told = []
    for override in overrides:
        name, _, value = override.partition("=")
        if name.strip() == "tracking.uri" and masked(value) != value:
            os.environ[STORE_VARIABLE] = value.strip().strip("'\"")
            override = f"{name}={masked(value)}"
        told.append(override)
    return told


def artifact_location(uri: str) -> str | None:
    """Return where a new experiment keeps its files: beside a sqlite database; None leaves it to the server."""
    database = _sqlite_path(uri)
    return (database.parent / ARTIFACTS).as_uri() if database is not None else None


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
