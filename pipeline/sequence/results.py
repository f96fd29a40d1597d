"""run.json and matrix.json of a run that is worked on: a call that fails leaves what was finished as it was."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.files.atomic import write_if_other
from pipeline.runs.layout import MATRIX
from pipeline.runs.state import FINISHED, RunState

log = logging.getLogger(__name__)
OF_THE_RUN = ("status", "stage", "stages")  # of run.json: how far the run is


class RunResults(RunState):
    """What the two files said when a call began, and what they may say now; for rank 0, which writes them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._rows = _rows(path / MATRIX)  # of the matrix that is there
        self._trains = self._trained = False  # a stage, in this call

    def begins(self, stage: int, rows: int) -> None:
        """The stage of this number (0-based) is trained now, whose row is the matrix's row `rows` (0-based).

        Where the run had it, rows and status from there on belong to what is replaced.
        """
        self._rows = min(self._rows, rows)
        self.finished = self.finished and stage >= int(self.state.get("stage") or 0)
        self._trains = True

    def trained(self) -> None:
        """That stage is saved: the run is further than it was."""
        self._trained = True

    def stay_finished(self, stopped: bool) -> bool:
        """Whether run.json still calls the run finished when a stop, or an error, ends the call now."""
        return self.finished and not self._trained and not (stopped and self._trains)

    def write_state(self, status: str, facts: Mapping[str, Any]) -> None:
        """Write run.json with this status, unless what it says is more and still true.

        `status`: running, failed, stopped (to be gone on with), trained or done.
        """
        kept = self.finished and not self._trained
        if kept and not self._trains and status not in FINISHED:
            return
        content = {**facts, "status": status}
        if kept and (status == "failed" or self.says_less(status)):
            content |= {name: self.state[name] for name in OF_THE_RUN if name in self.state}
        content["stage"] = max(int(content["stage"]), int(self.state.get("stage") or 0) if self.finished else 0)
        self.write(content)

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
