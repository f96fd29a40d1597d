"""run.json of a run that is worked on: what an earlier call left in it, and what this call may write; for both halves.

A call that fails leaves what was finished as it was.
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
from pipeline.runs.provenance import package_versions

if TYPE_CHECKING:
    from pipeline.ranks.world import World  # torch: reports read run.json without it

FINISHED = ("trained", "done")  # what a call that trains nothing does not take back; the second says more
OF_ALL_CALLS = ("evaluate_s", "total_s")  # of its timing: what every call adds to; others are of the last that did it


class RunState:
    """What run.json said when a call began, and what it may say now; for rank 0, which writes it."""

    def __init__(self, path: Path) -> None:
        """`path` is the run folder."""
        self.path = path
        found = read_state(path)
        self.state: dict[str, Any] = found if isinstance(found, dict) else {}  # as an earlier call left it
        self.finished = self.status in FINISHED  # as an earlier call left it, and nothing has changed that since
        self._started: str | None = self.state.get("started")
        self._began = time.perf_counter()

    @property
    def status(self) -> str:
        """The status that an earlier call left."""
        return str(self.state.get("status"))

    def says_less(self, status: str) -> bool:
        """Whether a status is that of a finished run, and says less than the one that an earlier call left."""
        return status in FINISHED and FINISHED.index(status) < FINISHED.index(self.status)

    def common(self, world: World, tracked: Mapping[str, Any]) -> dict[str, Any]:
        """What run.json says of every kind of run; `tracked` are the ids of its runs in the tracker."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._started = self._started or now
        return {
            "started": self._started,
            "updated": now,
            "world_size": world.size,
            "mlflow": dict(tracked),
            "versions": package_versions(),
        }

    def seconds(self) -> float:
        """How long this call has taken so far."""
        return time.perf_counter() - self._began

    def times(self, now: Mapping[str, float]) -> dict[str, float]:
        """The seconds that run.json is to name: those of this call so far, `now`, with those of the calls before it."""
        before: dict[str, float] = {}
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # a damaged file costs the earlier times
            before = {name: float(seconds) for name, seconds in (self.state.get("timing") or {}).items()}
        added = {name: round(before.get(name, 0.0) + now[name], 1) for name in OF_ALL_CALLS if name in now}
        return {**before, **now, **added}

    def write(self, content: Mapping[str, Any]) -> None:
        """Write run.json, whole or not at all."""
        write_json(self.path / STATE, content)


def read_state(run: Path) -> dict[str, Any]:
    """What an earlier attempt left in a run's run.json; empty when there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run / STATE).read_text("utf-8"))
    return {}
