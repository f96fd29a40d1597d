"""Metrics of the service in Prometheus' text format.

Written without prometheus_client, whose registry is global to the process; only four kinds of line are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from pipeline.adapter.answer import Chosen

BOUNDS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PREFIX = "pipeline_serve_"


class Metrics:
    """Requests by status, their durations, answers by prompt set, and unfamiliar questions; for the event loop only."""

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        self.sets: Counter[str] = Counter()
        self.unfamiliar = 0  # answered questions that resemble no task
        self._buckets: Counter[float] = Counter()
        self._seconds = 0.0

    def finished(self, status: int, seconds: float) -> None:
        """Count a chat request that ended with this status after `seconds`."""
        self.requests[status] += 1
        self._seconds += seconds
        for bound in BOUNDS_S:
            self._buckets[bound] += seconds <= bound

    def answered(self, chosen: Chosen) -> None:
        """Count an answer by the sets of its question, and as one to an unfamiliar question where it is."""
        self.sets.update(chosen.selected)
        self.unfamiliar += chosen.unfamiliar is True

    def text(self, gauges: Mapping[str, int], counters: Mapping[str, int]) -> str:
        """The metrics page, with gauges and counters of the worker."""
        lines = []
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, value in values.items():
                lines += [f"# TYPE {PREFIX}{name} {kind}", f"{PREFIX}{name} {value}"]
        lines.append(f"# TYPE {PREFIX}requests_total counter")
        lines += [f'{PREFIX}requests_total{{status="{status}"}} {n}' for status, n in sorted(self.requests.items())]
        lines.append(f"# TYPE {PREFIX}answers_by_set_total counter")
        lines += [f'{PREFIX}answers_by_set_total{{set="{name}"}} {n}' for name, n in sorted(self.sets.items())]
        lines += [f"# TYPE {PREFIX}unfamiliar_total counter", f"{PREFIX}unfamiliar_total {self.unfamiliar}"]
        name, total = f"{PREFIX}request_seconds", self.requests.total()
        lines.append(f"# TYPE {name} histogram")
        lines += [f'{name}_bucket{{le="{bound:g}"}} {self._buckets[bound]}' for bound in BOUNDS_S]
        lines += [f'{name}_bucket{{le="+Inf"}} {total}', f"{name}_sum {self._seconds:.6f}", f"{name}_count {total}"]
        return "\n".join(lines) + "\n"
