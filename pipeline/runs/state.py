"""run.json: how far a run is."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any


def read_state(run: Path) -> dict[str, Any]:
    """What an earlier attempt left in a run's run.json; empty when there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run / "run.json").read_text("utf-8"))
    return {}
