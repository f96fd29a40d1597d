"""Several trackers of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pipeline.tracking.tracker import Register, Tracker, never


class SeveralTrackers:
    """Reports to each of its trackers, in their order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = trackers

    @contextmanager
    def sequence(self, state: Mapping[str, Any], stays_finished: Callable[[bool], bool] = never) -> Iterator[None]:
        with ExitStack() as opened:
            for tracker in self.trackers:
                opened.enter_context(tracker.sequence(state, stays_finished))
            yield

    @contextmanager
    def stage(self, index: int, name: str) -> Iterator[None]:
        with ExitStack() as opened:
            for tracker in self.trackers:
                opened.enter_context(tracker.stage(index, name))
            yield

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        for tracker in self.trackers:
            tracker.metrics(values, step)

    def params(self, values: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.params(values)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        for tracker in self.trackers:
            tracker.artifact(path, folder)

    def stage_model(self, folder: Path, name: str, metrics: Mapping[str, float | None]) -> None:
        for tracker in self.trackers:
            tracker.stage_model(folder, name, metrics)

    def model_metrics(self, name: str, metrics: Mapping[str, float | None], step: int) -> None:
        for tracker in self.trackers:
            tracker.model_metrics(name, metrics, step)

    def results(self, run_path: Path, register: Register | None = None) -> None:
        for tracker in self.trackers:
            tracker.results(run_path, register)

    def run_ids(self) -> dict[str, Any]:
        return {name: value for tracker in self.trackers for name, value in tracker.run_ids().items()}
