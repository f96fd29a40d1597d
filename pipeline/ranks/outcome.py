"""How a rank ended, left in a file for the process that launched it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.ranks.environment import rank

OUTCOMES = "PIPELINE_OUTCOMES"  # folder in which the ranks of a launch leave how they ended


@dataclass(frozen=True)
class Outcome:
    """How a rank, or a whole launch, ended: exit code, the sentence for the user, and the result."""

    code: int
    error: str | None = None
    result: dict[str, Any] | None = None


def leave_outcome(outcome: Outcome) -> bool:
    """Write how this rank ended for the process that launched it; False when nobody asked for it."""
    folder = os.environ.get(OUTCOMES)
    if folder is None:
        return False
    path = Path(folder) / f"rank-{rank()}.json"
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    temporary.replace(path)
    return True
