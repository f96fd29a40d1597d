"""A queue of metrics for an MLflow store, which determines the order of a run's first metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow.entities import Metric

METRIC_BATCH = 1000  # metrics per call of log_batch; MLflow's limit
# MLflow's pages show the metric that a run logged first at the top, so it has to be one of the whole sequence.
HEADLINE = "last"


class WaitingMetrics:
    """Metrics of a sequence's runs that were not sent yet; `parent` is the id of the run of the whole sequence."""

    def __init__(self) -> None:
        self.parent: str | None = None
        self._waiting: dict[str, list[Metric]] = {}
        self._before_headline: list[Metric] = []
        self._has_headline = False

    def add(self, run_id: str, entries: list[Metric]) -> None:
        """Queue metrics of a run; those of the parent are held back until its headline, after the first stage.

        The headline is then sent first, followed by the metrics from before it.
        """
        if run_id == self.parent and not self._has_headline:
            if not any(entry.key == HEADLINE for entry in entries):
                self._before_headline += entries
                return
            entries = sorted(entries, key=lambda entry: entry.key != HEADLINE) + self._before_headline
            self._before_headline, self._has_headline = [], True
        self._waiting.setdefault(run_id, []).extend(entries)

    def release(self) -> None:
        """Queue the parent's metrics for sending although there is no headline."""
        if self.parent is not None and self._before_headline:
            self._waiting.setdefault(self.parent, []).extend(self._before_headline)
            self._before_headline = []

    def drop(self) -> None:
        """Discard the parent's metrics that were not sent."""
        self._before_headline = []
        if self.parent is not None:
            self._waiting.pop(self.parent, None)

    def send(self, log: Callable[[str, list[Metric]], object], but: str | None = None) -> None:
        """Call `log` with each run's id and metrics, except for the run `but`; when it raises, they stay queued."""
        for run_id, entries in list(self._waiting.items()):
            if run_id == but:
                continue
            while entries:
                log(run_id, entries[:METRIC_BATCH])
                del entries[:METRIC_BATCH]
            del self._waiting[run_id]
