"""run.json of a run in progress, for both halves: the state that an earlier call left, and what this call writes.

A call that fails does not change the status of finished results.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.files.atomic import write_json
from pipeline.runs.layout import STATE
from pipeline.runs.provenance import code, package_versions

if TYPE_CHECKING:
    from pipeline.ranks.world import World  # torch: reports read run.json without it

TRAINED = "trained"  # all stages are finished, and the matrix is missing
FINISHED = (TRAINED, "done")  # statuses that a call which trains nothing does not revoke; "done" includes "trained"
OF_ALL_CALLS = ("evaluate_s", "total_s")  # timings that are summed over calls; others are those of the last call


class RunState:
    """run.json as an earlier call left it, and what this call writes; for rank 0."""

    def __init__(self, path: Path) -> None:
        """`path` is the run folder."""
        self.path = path
        found = read_state(path)
        self.state: dict[str, Any] = found if isinstance(found, dict) else {}  # as an earlier call left it
        self.finished = self.status in FINISHED  # whether it was finished and this call has not changed that
        self._started: str | None = self.state.get("started")
        self._began = time.perf_counter()

    @property
    def status(self) -> str:
        """The status that an earlier call left."""
        return str(self.state.get("status"))

    def says_less(self, status: str) -> bool:
        """Whether a status is "trained" where an earlier call left "done"."""
        return self.status in FINISHED and status in FINISHED and FINISHED.index(status) < FINISHED.index(self.status)

    def common(self, world: World, tracked: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of run.json that all kinds of runs have; `tracked` are the ids of its runs in MLflow."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._started = self._started or now
        return {
            "started": self._started,
            "updated": now,
            "world_size": world.size,
            "mlflow": dict(tracked),
            **code(),
            "versions": package_versions(),
        }

    def seconds(self) -> float:
        """Seconds since the call began."""
        return time.perf_counter() - self._began

    def times(self, now: Mapping[str, float]) -> dict[str, float]:
        """The timings for run.json: those of this call so far, `now`, combined with those of earlier calls."""
        before: dict[str, float] = {}
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # a damaged entry: start from zero
            before = {name: float(seconds) for name, seconds in (self.state.get("timing") or {}).items()}
        added = {name: round(before.get(name, 0.0) + now[name], 1) for name in OF_ALL_CALLS if name in now}
        return {**before, **now, **added}

    def write(self, content: Mapping[str, Any]) -> None:
        """Write run.json atomically."""
        write_json(self.path / STATE, content)


def read_state(run: Path) -> dict[str, Any]:
    """The content of a run's run.json; {} when it is missing or unreadable."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run / STATE).read_text("utf-8"))
    return {}
