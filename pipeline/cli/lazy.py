"""Modules that are imported when a verb uses them, so that help and completion answer without torch.

A module of the command line lists them at its top, for readers and for mypy under TYPE_CHECKING, and otherwise by
`lazy`: what the verbs do needs torch, transformers, DeepSpeed, MLflow or matplotlib, whose imports take seconds.
"""

from __future__ import annotations

import importlib
from typing import Any


class Lazy:
    """Stands for a module; the first look at one of its names imports it."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.module), name)


def lazy(module: str) -> Any:
    """Return what stands for the module of that name."""
    return Lazy(module)
