"""Lazy imports, so that help and completion do not import torch.

The verbs need torch, transformers, DeepSpeed, MLflow or matplotlib, whose imports take seconds. A module of the command
line lists what it needs at its top: for readers and mypy under TYPE_CHECKING, at run time by `lazy`.
"""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.ranks.collector import collector_paused


class Lazy:
    """A proxy of a module, which is imported at the first access to an attribute."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        with collector_paused():
            return getattr(importlib.import_module(self.module), name)


def lazy(module: str) -> Any:
    """Return a proxy of the module of that name."""
    return Lazy(module)
