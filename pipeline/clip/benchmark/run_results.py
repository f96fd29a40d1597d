"""run.json and results.json of a benchmark that is worked on: a call that fails leaves what was finished as it was."""

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
    """What the two files said when a call began, and what they may say now; for rank 0, which writes them."""

    def __init__(self, path: Path, units: Sequence[Row]) -> None:
        """`path` is the run folder, `units` are all that the run has now."""
        super().__init__(path)
        self._rows = _rows(path / RESULTS) & set(units)

    def trains(self, unit: Row) -> None:
        """A unit is trained now: the run is in progress, and a row that the unit has is of what is replaced."""
        self.finished = False
        self._rows.discard(unit)

    def stay_finished(self, stopped: bool) -> bool:
        """Whether run.json still calls the run finished when a stop, or an error, ends the call now."""
        return self.finished

    def write_state(self, status: str, facts: Mapping[str, Any]) -> None:
        """Write run.json with this status, unless what it says is more and still true.

        `status`: running, failed, stopped (to be gone on with), trained or done.
        """
        if self.finished:
            if status not in FINISHED:
                return
            status = self.status if self.says_less(status) else status
        self.write({**facts, "status": status})

    def write_results(self, content: Mapping[str, Any], found: Sequence[UnitResult], last: bool) -> bool:
        """Write results.json, the `content` of the results `found`, unless it has a row that they do not have (yet).

        Of a finished run only in the `last` call. Returns whether they have all rows; the last call says which not.
        """
        lost = self._rows - {result.row for result in found}
        if not lost and (last or not self.finished):
            write_if_other(self.path / RESULTS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        if lost and last:
            names = ", ".join(sorted(f"{method}-{dataset}-s{seed}" for method, dataset, seed in lost))
            log.warning("%s keeps the results of %s, which this call did not go through.", self.path / RESULTS, names)
        return not lost


def _rows(path: Path) -> set[Row]:
    """The units of a results.json; none where there is no file that can be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return {UnitResult.from_json(unit).row for unit in json.loads(path.read_text("utf-8"))["units"]}
    return set()
