"""Finds the fingerprint of the base model that is recorded with the results in a run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.runs.layout import EVALUATIONS, META, RESUME, STAGES, UNITS

# Finished stages and units, checkpoints in unfinished ones, and answers: a run may have only some of these.
RECORDS = (
    f"{STAGES}/*/{META}",
    f"{UNITS}/*/{META}",
    f"{STAGES}/*/{RESUME}/*/state.json",
    f"{UNITS}/*/{RESUME}/*/state.json",
)
ANSWERS = f"{EVALUATIONS}/*/*.score.json"


def recorded_base_model(run: Path) -> str | None:
    """Return the first recorded fingerprint in a run folder, None where there is none yet."""
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
                continue  # whatever uses a damaged file reports it
            yield content.get("made_with") if pattern == ANSWERS and isinstance(content, dict) else content
