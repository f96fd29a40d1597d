"""The tracker that writes event files for TensorBoard into the run's folder: `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.tracking.curves import WHOLE, Curves, CurveTracker

FOLDER = "tensorboard"
REWRITTEN = ".rewritten"  # suffix of a folder of event files that replaces another
TOLERANCE = 1e-6  # relative; event files have float32


class EventFiles(Curves):
    """The event files of one folder, in which each step of a curve is once.

    A run that is resumed or evaluated anew repeats steps. TensorBoard would draw both, so a repeated number is left out
    where it is equal, and the files are written anew where it is not.
    """

    def __init__(self, folder: Path, texts: Mapping[str, str]) -> None:
        self.folder, self.texts = folder, texts
        self.known = read_events(folder)
        self._is_new = not folder.exists()
        self._writer = self._write_to(folder)

    def add(self, values: Mapping[str, float], step: int) -> None:
        new = {name: value for name, value in values.items() if step not in self.known.get(name, {})}
        differs = False
        for name, value in values.items():
            before = self.known.setdefault(name, {}).get(step)
            differs |= before is not None and abs(before - value) > TOLERANCE * max(abs(before), abs(value))
            self.known[name][step] = value
        if differs:
            self._rewrite()
            return
        for name, value in new.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        self._writer.close()

    def _rewrite(self) -> None:
        """Replace the files by new ones with what is known; a process that is killed meanwhile leaves the old ones."""
        self._writer.close()
        beside = self.folder.with_name(self.folder.name + REWRITTEN)
        shutil.rmtree(beside, ignore_errors=True)
        self._is_new = True
        writer = self._write_to(beside)
        for name, points in self.known.items():
            for step, value in sorted(points.items()):
                writer.add_scalar(name, value, step)
        writer.close()
        for old in self.folder.glob("events.out.tfevents.*"):
            old.unlink()
        for file in beside.iterdir():
            file.rename(self.folder / file.name)
        beside.rmdir()
        self._is_new = False
        self._writer = self._write_to(self.folder)

    def _write_to(self, folder: Path) -> Any:
        from torch.utils.tensorboard import SummaryWriter  # tensorboard is an extra, and only rank 0 needs it

        writer = SummaryWriter(str(folder))
        if self._is_new:
            for name, text in self.texts.items():
                writer.add_text(name, text, 0)
        return writer


class TensorboardTracker(CurveTracker):
    """Writes a folder of event files for the run and for each of its stages or units."""

    service, field = "TensorBoard", "tracking.tensorboard"

    def curves(self, label: str) -> EventFiles:
        lines = [f"    {name}: {value}" for name, value in self.settings.items()]
        return EventFiles(self.run_path / FOLDER / label, {"recipe": "\n".join(lines)} if label == WHOLE else {})


def read_events(folder: Path) -> dict[str, dict[int, float]]:
    """The curves in a folder's event files: name -> step -> value, of which the one written last counts."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, TENSORS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0, TENSORS: 1}, purge_orphaned_data=False)
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()[SCALARS]}
