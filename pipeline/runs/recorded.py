"""Which base model the results in a run folder say they were made with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.runs.layout import EVALUATIONS, META, RESUME, STAGES, UNITS

# Finished stages or units, checkpoints inside unfinished ones, answers: where a run without the first may have others.
RECORDS = (
    f"{STAGES}/*/{META}",
    f"{UNITS}/*/{META}",
    f"{STAGES}/*/{RESUME}/*/state.json",
    f"{UNITS}/*/{RESUME}/*/state.json",
)
ANSWERS = f"{EVALUATIONS}/*/*.score.json"


def recorded_base_model(run: Path) -> str | None:
    """Return the fingerprint that a run's folder names first, None where it names none yet."""
    for content in _records(run):
        found = content.get("base_model") if isinstance(content, dict) else None
        if isinstance(found, str):
            return found
    return None


def _records(run: Path) -> Iterator[Any]:
    for pattern in (*RECORDS, ANSWERS):
        for path in sorted(run.glob(pattern)):
            try:
                content = json.loads(path.read_text("utf-8"))
            except (OSError, ValueError):
                continue  # a damaged one is named where it is read for its own sake
            yield content.get("made_with") if pattern == ANSWERS and isinstance(content, dict) else content
