"""The folder of the project, and the resolution of paths in recipes."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]  # the folder pipeline/
PROJECT = PACKAGE.parent  # a checkout, or the folder that a wheel was installed into; it has data_prep/ too


def locate(path: str) -> str:
    """Return `path` if it exists here, else the same path inside the project if that exists, else `path` (a hub id)."""
    if not Path(path).exists() and (PROJECT / path).exists():
        return str(PROJECT / path)
    return path
