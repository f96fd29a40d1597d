"""The layout of a run folder: the names of what lies in it."""

from __future__ import annotations

from pathlib import Path

CONFIG = "config.yaml"  # the resolved recipe
LOCK = "LOCK"  # the file that the run's writer holds a lock on
LENGTHS_FILE = "lengths.json"  # what was decided about long samples, and of which data and settings
RESUME = "resume"  # folder of a stage's checkpoints while it is trained (see `pipeline.training.resume`)


def stage_folder(run: Path, index: int, name: str) -> Path:
    """Folder of a finished stage; `index` is 0-based."""
    return run / "stages" / f"{index + 1:02d}-{name}"


def unfinished_folder(run: Path, index: int, name: str) -> Path:
    """Folder of a stage while it is trained; of an earlier attempt only its checkpoints are of use (see resume)."""
    return run / "stages" / f"{index + 1:02d}-{name}.unfinished"
