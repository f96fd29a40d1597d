"""MLflow tracking: one parent run per sequence, one child run per stage, prompt sets as LoggedModels.

Only rank 0 tracks; the other ranks and `tracking.enabled=false` get a NullTracker with the same methods. A store that
cannot be reached at the start is the user's to mend (UserError); once training runs, a failing store costs a warning
and nothing else: metrics wait in memory and are sent when the store answers again.
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
    """What a tracker is told about a run, be it a task sequence or a benchmark."""

    name: str  # the recipe's
    method: str
    model: str  # path or Hugging Face id of the frozen model
    prepared: Path  # folder of the prepared data
    tasks: tuple[str, ...]  # what is prepared there
    tracking: TrackingConfig
    settings: Mapping[str, Any]  # the whole recipe, as it is written to YAML


@dataclass(frozen=True)
class StoredRun:
    """A run in an open MLflow store, for those who write more than a tracker does."""

    client: Any  # mlflow.MlflowClient
    uri: str
    experiment: str
    run_id: str


Register = Callable[[StoredRun], None]


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

    def results(self, run_path: Path, register: Register | None = None) -> None:
        """Upload report, matrix, figures and a sample of the predictions.

        `register`, given for a complete run, puts what was learned into the store's model registry.
        """

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

    def results(self, run_path: Path, register: Register | None = None) -> None:
        pass

    def run_ids(self) -> dict[str, Any]:
        return {}
