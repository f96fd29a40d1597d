"""run.json and matrix.json of a run: a failing call leaves finished results unchanged (docs/design.md 3.11)."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.files.atomic import write_if_other
from pipeline.runs.layout import MATRIX
from pipeline.runs.state import FINISHED, TRAINED, RunState

log = logging.getLogger(__name__)
OF_THE_RUN = ("status", "stage", "stages")  # the fields of run.json that describe the run's progress


class RunResults(RunState):
    """The two files' content at the start of a call, which decides what the call may overwrite; for rank 0."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._rows = _rows(path / MATRIX)  # number of rows of the existing matrix
        self._trains = self._trained = False  # whether this call has started, and finished, training a stage

    def begins(self, stage: int, rows: int) -> None:
        """Record that the training of a stage (0-based) starts, whose row of the matrix is `rows` (0-based).

        If the run had that stage before, its later rows and its status are those of the stages that are replaced.
        """
        self._rows = min(self._rows, rows)
        self.finished = self.finished and stage >= int(self.state.get("stage") or 0)
        self._trains = True

    def outdate(self) -> None:
        """Record that finished stages will answer otherwise than before, so that the matrix is no longer theirs.

        A run that was done is a trained one then, which an evaluation completes.
        """
        (self.path / MATRIX).unlink(missing_ok=True)
        self._rows = 0
        if self.says_less(TRAINED):
            self.state = {**self.state, "status": TRAINED}
            self.write(self.state)

    def trained(self) -> None:
        """Record that the stage is saved."""
        self._trained = True

    def stay_finished(self, stopped: bool) -> bool:
        """Whether run.json keeps its finished status if a stop or an error ends the call now."""
        return self.finished and not self._trained and not (stopped and self._trains)

    def write_state(self, status: str, facts: Mapping[str, Any]) -> None:
        """Write run.json with this status, unless the file has a more advanced status that still holds.

        `status`: running, failed, stopped (resumable), trained or done.
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
        """Write matrix.json, unless the existing one has more rows.

        Before the end of a call (not `last`) it is written only if it has more rows than the existing one.
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
