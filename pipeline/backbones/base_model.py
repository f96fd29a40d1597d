"""What tells base models apart, and which one the results in a run's folder say they were made with."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.hub.snapshots import Source, checkpoint
from pipeline.hub.weights import SCHEME, file_fingerprints, tensors_fingerprint

log = logging.getLogger("pipeline.backbones.base_model")
# Finished stages or units, checkpoints inside unfinished ones, answers: where a run without the first may have others.
RECORDS = ("stages/*/meta.json", "units/*/meta.json", "stages/*/resume/*/state.json", "units/*/resume/*/state.json")
ANSWERS = "eval/*/*.score.json"


def fingerprint(source: Source, recorded: str | None = None) -> str:
    """A model's fingerprint, see `weights.tensors_fingerprint`; the checkpoint is fetched where it is not here.

    A run or adapter from before there was that scheme `recorded` another value; where it is still this model's it is
    returned, so that what was made with it can be gone on with. Raises UserError when weights are missing.
    """
    folder = checkpoint(source).folder
    if recorded is not None and not recorded.startswith(SCHEME):
        *with_weights, without = file_fingerprints(folder)
        if recorded in with_weights:
            return recorded
        if recorded == without:
            log.warning(
                "What was made with '%s' recorded its config.json and none of its weights, which were fetched "
                "later; these are taken to be the same.",
                source.path,
            )
            return recorded
    return tensors_fingerprint(folder)


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
