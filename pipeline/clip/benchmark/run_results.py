"""run.json and results.json of a benchmark: a failing call leaves finished results unchanged (docs/design.md 3.11)."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.clip.benchmark.results import Row, UnitResult
from pipeline.files.atomic import write_if_other
from pipeline.runs.layout import RESULTS
from pipeline.runs.state import FINISHED, RunState

log = logging.getLogger(__name__)


class BenchmarkResults(RunState):
    """The two files' content at the start of a call, which decides what the call may overwrite; for rank 0."""

    def __init__(self, path: Path, units: Sequence[Row]) -> None:
        """`path` is the run folder, `units` are the rows of all units of the benchmark."""
        super().__init__(path)
        self._rows = _rows(path / RESULTS) & set(units)

    def trains(self, unit: Row) -> None:
        """Mark the run as in progress and drop the unit's earlier row, because the unit is trained again."""
        self.finished = False
        self._rows.discard(unit)

    def stay_finished(self, stopped: bool) -> bool:
        """Whether run.json keeps its finished status if a stop or an error ends the call now."""
        return self.finished

    def write_state(self, status: str, facts: Mapping[str, Any]) -> None:
        """Write run.json with this status, unless the file has a more advanced status that still holds.

        `status`: running, failed, stopped (resumable), trained or done.
        """
        if self.finished:
            if status not in FINISHED:
                return
            status = self.status if self.says_less(status) else status
        self.write({**facts, "status": status})

    def write_results(self, content: Mapping[str, Any], found: Sequence[UnitResult], last: bool) -> bool:
        """Write results.json, unless that would lose a row of an earlier call; returns whether no row is missing.

        Args:
            content: the new content of the file.
            found: the results it was made of.
            last: the call has no further results. A finished run's file is written only then, and only then is a
                warning logged about missing rows.
        """
        lost = self._rows - {result.row for result in found}
        if not lost and (last or not self.finished):
            write_if_other(self.path / RESULTS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        if lost and last:
            names = ", ".join(sorted(f"{method}-{dataset}-s{seed}" for method, dataset, seed in lost))
            log.warning("%s keeps the results of %s, which this call left out.", self.path / RESULTS, names)
        return not lost


def _rows(path: Path) -> set[Row]:
    """The units of a results.json; none where the file is missing or unreadable."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return {UnitResult.from_json(unit).row for unit in json.loads(path.read_text("utf-8"))["units"]}
    return set()
