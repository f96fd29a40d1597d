"""Where the project is, and what a path in a recipe means."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]  # the folder pipeline/
PROJECT = PACKAGE.parent  # a checkout, or what a wheel was installed into; data_prep/ is there too


def locate(path: str) -> str:
    """Return `path` if it exists here, else the same path inside the project if that exists, else `path` (a hub id)."""
    if not Path(path).exists() and (PROJECT / path).exists():
        return str(PROJECT / path)
    return path
