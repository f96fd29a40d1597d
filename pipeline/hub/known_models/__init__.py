"""Sizes of the models that the shipped recipes name, so that a memory plan can be made before a model is fetched.

Each file is named by the id of a repository and holds those numbers of its config.json that a memory plan depends on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def known_settings(path: str) -> dict[str, Any] | None:
    """Return the shipped part of a repository's configuration; None for a repository without one."""
    file = Path(__file__).parent / f"{path.replace('/', '--')}.json"
    return json.loads(file.read_text("utf-8")) if "/" in path and file.is_file() else None


def known_config(path: str) -> Any:
    """`known_settings` as a configuration of transformers; raises OSError for a repository without one."""
    from transformers import AutoConfig

    settings = known_settings(path)
    if settings is None:
        raise OSError(f"the sizes of '{path}' are not known here")
    return AutoConfig.for_model(**settings)
