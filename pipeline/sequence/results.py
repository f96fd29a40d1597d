"""run.json and matrix.json of a run that is worked on: a call that fails leaves what was finished as it was."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.runs.finished import read_state, write_json
from pipeline.sequence.predictions import write_if_other

log = logging.getLogger("pipeline.sequence.run")
STATE, MATRIX = "run.json", "matrix.json"
FINISHED = ("trained", "done")  # what a call that trains nothing does not take back; the second says more
OF_THE_RUN = ("status", "stage", "stages")  # of run.json: how far the run is
OF_ALL_CALLS = ("evaluate_s", "total_s")  # of its timing: what every call adds to; others are of the last that did it


class RunResults:
    """What the two files said when a call began, and what they may say now; for rank 0, which writes them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state: dict[str, Any] = read_state(path)  # of run.json, as an earlier call left it
        self._rows = _rows(path / MATRIX)  # of the matrix that is there
        self._finished = str(self.state.get("status")) in FINISHED
        self._trains = self._trained = False  # a stage, in this call

    def begins(self, stage: int, rows: int) -> None:
        """The stage of this number (0-based) is trained now, whose row is the matrix's row `rows` (0-based).

        Where the run had it, rows and status from there on belong to what is replaced.
        """
        self._rows = min(self._rows, rows)
        self._finished = self._finished and stage >= int(self.state.get("stage") or 0)
        self._trains = True

    def trained(self) -> None:
        """That stage is saved: the run is further than it was."""
        self._trained = True

    def stay_finished(self, stopped: bool) -> bool:
        """Whether run.json still calls the run finished when a stop, or an error, ends the call now."""
        return self._finished and not self._trained and not (stopped and self._trains)

    def write_state(self, status: str, facts: Mapping[str, Any]) -> None:
        """Write run.json with this status, unless what it says is more and still true.

        `status`: running, failed, stopped (to be gone on with), trained or done.
        """
        kept = self._finished and not self._trained
        if kept and not self._trains and status not in FINISHED:
            return
        content = {**facts, "status": status}
        before = str(self.state.get("status"))
        if kept and (status == "failed" or (status in FINISHED and FINISHED.index(status) < FINISHED.index(before))):
            content |= {name: self.state[name] for name in OF_THE_RUN if name in self.state}
        content["stage"] = max(int(content["stage"]), int(self.state.get("stage") or 0) if self._finished else 0)
        write_json(self.path / STATE, content)

    def times(self, now: Mapping[str, float]) -> dict[str, float]:
        """The seconds that run.json is to name: those of this call so far, `now`, with those of the calls before it."""
        before: dict[str, float] = self.state.get("timing") or {}
        added = {name: round(before.get(name, 0.0) + now[name], 1) for name in OF_ALL_CALLS if name in now}
        return {**before, **now, **added}

    def write_matrix(self, content: Mapping[str, Any], last: bool) -> None:
        """Write matrix.json, in the middle of a call (not `last`) only if it has more rows than the one that is there.

        One with fewer rows is never written over it.
        """
        rows = len(content["accuracy"])
        if rows < self._rows and last:
            log.warning(
                "%s keeps its %d rows: this call went through the first %d only.", self.path / MATRIX, self._rows, rows
            )
        if rows > self._rows or (last and rows == self._rows):
            write_if_other(self.path / MATRIX, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _rows(path: Path) -> int:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return len(json.loads(path.read_text("utf-8"))["accuracy"])
    return 0
