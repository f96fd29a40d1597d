"""The sizes of the models that the shipped recipes name, so that memory can be planned before one is fetched.

Each file holds the numbers of one repository's config.json that a memory plan depends on, under its id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def known_settings(path: str) -> dict[str, Any] | None:
    """Return what is known of the configuration of a repository on the Hub, None for all but a few."""
    file = Path(__file__).parent / f"{path.replace('/', '--')}.json"
    return json.loads(file.read_text("utf-8")) if "/" in path and file.is_file() else None


def known_config(path: str) -> Any:
    """Return it as transformers' configuration; raises OSError when the repository is not among the known."""
    from transformers import AutoConfig

    settings = known_settings(path)
    if settings is None:
        raise OSError(f"the sizes of '{path}' are not known here")
    return AutoConfig.for_model(**settings)
