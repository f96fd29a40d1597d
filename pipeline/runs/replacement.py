"""The end of a replacement of a finished folder, see `pipeline.runs.finished`, for programs that read no tensors."""

from __future__ import annotations

from pathlib import Path

from pipeline.files.atomic import sync_folder
from pipeline.runs.layout import COMPLETE


def finish_replacement(work: Path, final: Path) -> None:
    """Rename a complete folder to `final` where `finish_folder` was killed after it had removed the former one."""
    if not final.exists() and (work / COMPLETE).is_file():
        work.rename(final)
        sync_folder(final.parent)
