"""Metrics on their way to an MLflow store: in which order a run's first ones go, and which of them wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Metric

METRIC_BATCH = 1000  # MLflow takes at most so many in one call
# MLflow's pages begin with the number that a run logged first: that of the whole sequence, not a task's.
HEADLINE = "last"


class WaitingMetrics:
    """The metrics of a sequence's runs that the store does not have yet; `parent` is the run of the whole sequence."""

    def __init__(self) -> None:
        self.parent: str | None = None
        self._waiting: dict[str, list[Metric]] = {}
        self._before_headline: list[Metric] = []
        self._has_headline = False

    def add(self, run_id: str, entries: list[Metric]) -> None:
        """Take metrics of a run; those of the parent wait for its headline, which comes with the first finished stage.

        Behind it stand the numbers from before any training.
        """
        if run_id == self.parent and not self._has_headline:
            if not any(entry.key == HEADLINE for entry in entries):
                self._before_headline += entries
                return
            entries = sorted(entries, key=lambda entry: entry.key != HEADLINE) + self._before_headline
            self._before_headline, self._has_headline = [], True
        self._waiting.setdefault(run_id, []).extend(entries)

    def release(self) -> None:
        """Let the parent's metrics go although no headline came."""
        if self.parent is not None and self._before_headline:
            self._waiting.setdefault(self.parent, []).extend(self._before_headline)
            self._before_headline = []

    def drop(self) -> None:
        """Forget what the parent has not sent."""
        self._before_headline = []
        if self.parent is not None:
            self._waiting.pop(self.parent, None)

    def send(self, log: Callable[[str, list[Metric]], object], but: str | None = None) -> None:
        """Give `log` a run's id and its metrics, except for the run `but`; what it raises for stays here."""
        for run_id, entries in list(self._waiting.items()):
            if run_id == but:
                continue
            while entries:
                log(run_id, entries[:METRIC_BATCH])
                del entries[:METRIC_BATCH]
            del self._waiting[run_id]
