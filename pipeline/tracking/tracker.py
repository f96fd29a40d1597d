"""MLflow tracking: one parent run per sequence, one child run per stage, prompt sets as LoggedModels.

Only rank 0 tracks; other ranks, and all with `tracking.enabled=false`, have a NullTracker with the same methods. A
store that cannot be reached at the start raises UserError. A store that fails during training causes one warning:
metrics are kept in memory and sent when the store responds again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.config.base import TrackingConfig


@dataclass(frozen=True)
class RunFacts:
    """The description of a run, a task sequence or a benchmark, for a tracker."""

    name: str  # the recipe's
    method: str
    model: str  # path or Hugging Face id of the frozen model
    prepared: Path  # folder of the prepared data
    tasks: tuple[str, ...]  # names of the tasks or datasets that are prepared there
    tracking: TrackingConfig
    settings: Mapping[str, Any]  # the whole recipe, as it is written to YAML


@dataclass(frozen=True)
class StoredRun:
    """A run in an open MLflow store, for code that writes to it directly."""

    client: Any  # mlflow.MlflowClient
    uri: str
    experiment: str
    run_id: str


Register = Callable[[StoredRun], None]


def never(_: bool) -> bool:
    """`stays_finished` of a run that was not finished before: its status is that of the call."""
    return False


class Tracker(Protocol):
    """What the sequence and the training loop report to a tracking server."""

    def sequence(
        self, state: Mapping[str, Any], stays_finished: Callable[[bool], bool] = never
    ) -> AbstractContextManager[None]:
        """Open the parent run; `state` is the content of run.json, whose "mlflow" entry names the runs to continue.

        `stays_finished` is asked when a stop (True) or an error (False) ends the call: whether the run was finished
        before and still is. Its parent run then keeps its status and end time, and the metrics of its matrix.
        """

    def stage(self, index: int, name: str) -> AbstractContextManager[None]:
        """Open the child run of a stage (index is 0-based); inside, the methods below write to this run."""

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        """Log numbers of one step; entries that are None are left out."""

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters that are known only at run time, such as parameter counts; each name once."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or the files of a folder."""

    def stage_model(self, folder: Path, name: str, metrics: Mapping[str, float | None]) -> None:
        """Register a stage checkpoint as a LoggedModel that can be searched by its metrics."""

    def model_metrics(self, name: str, metrics: Mapping[str, float | None], step: int) -> None:
        """Add numbers, such as the scores after its stage, to the LoggedModel that `stage_model` registered."""

    def results(self, run_path: Path, register: Register | None = None) -> None:
        """Upload report, matrix, figures and a sample of the predictions.

        `register`, given for a complete run, adds its adapter to the store's model registry.
        """

    def run_ids(self) -> dict[str, Any]:
        """Return the entry "mlflow" for run.json, with which a restart continues the same runs."""


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

    def results(self, run_path: Path, register: Register | None = None) -> None:
        pass

    def run_ids(self) -> dict[str, Any]:
        return {}
