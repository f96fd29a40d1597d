"""Replacements of what finished stages hold that a process was killed in, for programs that read no tensors."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError
from pipeline.files.atomic import sync_folder
from pipeline.runs.layout import COMPLETE, REPLACING_HEADS, REPLACING_ROUTING


def finish_replacement(work: Path, final: Path) -> None:
    """Rename a complete folder to `final` where `finish_folder` was killed after it had removed the former one."""
    if not final.exists() and (work / COMPLETE).is_file():
        work.rename(final)
        sync_folder(final.parent)


def refuse_half_replaced(run: Path) -> None:
    """Raise UserError for a run of which some stages have states or answer heads of one recipe, some of another."""
    for marker, what in (
        (REPLACING_ROUTING, f"What the stages of {run} keep for routing is"),
        (REPLACING_HEADS, f"The answer heads of {run} are"),
    ):
        if (run / marker).exists():
            raise UserError(
                f"{what} being replaced, or a process was killed while it did so. `python -m pipeline run RECIPE` with "
                "the run's recipe completes it."
            )
