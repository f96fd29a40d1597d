"""The outcome of a rank, written to a file for the process that launched it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.ranks.environment import rank

OUTCOMES = "PIPELINE_OUTCOMES"  # environment variable: the folder for the outcomes of a launch's ranks


@dataclass(frozen=True)
class Outcome:
    """The outcome of a rank or of a whole launch: exit code, error message for the user, and result."""

    code: int
    error: str | None = None
    result: dict[str, Any] | None = None


def leave_outcome(outcome: Outcome) -> bool:
    """Write this rank's outcome for the process that launched it; False where that set no folder for it."""
    folder = os.environ.get(OUTCOMES)
    if folder is None:
        return False
    path = Path(folder) / f"rank-{rank()}.json"
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    temporary.replace(path)
    return True
