"""The files of a benchmark's units in its run folder: prompts, results, and checkpoints of the unit in progress."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.clip.benchmark.checkpoint import load_prompts, save_prompts, unfinished
from pipeline.clip.benchmark.results import UnitResult
from pipeline.clip.images.prepared import PreparedDataset
from pipeline.clip.learning.unit import Unit
from pipeline.files.atomic import empty_folder, write_json
from pipeline.ranks.world import on_main, together
from pipeline.runs.claim import check_stage
from pipeline.runs.layout import METRICS
from pipeline.runs.session import Session
from pipeline.training.resume import StepState, cut_log, newest

RESULT = "result.json"


@dataclass(frozen=True)
class UnitFiles:
    """Reads and writes the files of units; UserError when they are damaged or made with another model or other data."""

    session: Session
    data: Mapping[str, PreparedDataset]  # by name
    base_model: str  # fingerprint of the backbone

    def folder(self, unit: Unit) -> Path:
        """The folder of a unit."""
        return unit.folder(self.session.path)

    def expected(self, unit: Unit) -> dict[str, Any]:
        """The fingerprints of model and data that a unit's meta.json has to match."""
        found = {"base_model": self.base_model, "data": unit.identity(self.data[unit.dataset.name])}
        return found | ({} if unit.descriptions is None else {"descriptions": unit.descriptions.identity()})

    def restore(self, unit: Unit) -> dict[str, Tensor] | None:
        """The trainables of a finished unit by name; None when it has to be trained. All ranks call it."""
        folder = self.folder(unit)
        # Rank 0 reads and broadcasts: ranks could see different files on a network file system.
        learned = on_main(self.session.world, lambda: load_prompts(folder))
        if learned is None:
            return None
        expected = together(lambda: self.expected(unit))
        together(lambda: check_stage(folder, learned.meta, expected))
        return learned.values

    def begin(self, unit: Unit) -> StepState | None:
        """The newest checkpoint of an unfinished unit; without one, None, and the unit's folder is emptied.

        For rank 0.
        """
        work = unfinished(self.folder(unit))
        found = newest(work)
        if found is None:
            empty_folder(work)
            return None
        check_stage(work, found.meta, self.expected(unit))
        cut_log(work / METRICS, found.step)
        return found

    def save(self, unit: Unit, values: dict[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Finish a unit with its trained values and `facts` for its meta.json; returns its folder.

        All ranks call it together, rank 0 writes.
        """
        folder, meta = self.folder(unit), {**self.expected(unit), **facts}
        on_main(self.session.world, lambda: save_prompts(folder, values, meta))
        return folder

    def result(self, unit: Unit) -> UnitResult | None:
        """The result of an evaluated unit; None where the file is missing or unreadable. All ranks call it."""

        def read() -> UnitResult | None:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                return UnitResult.from_json(json.loads((self.folder(unit) / RESULT).read_text("utf-8")))
            return None

        return on_main(self.session.world, read)

    def write_result(self, unit: Unit, result: UnitResult) -> None:
        """Write the result of a unit; rank 0 writes."""
        if self.session.world.main:
            write_json(self.folder(unit) / RESULT, result.to_json())
