"""Lazy imports, so that help and completion do not import torch.

The verbs need torch, transformers, DeepSpeed, MLflow or matplotlib, whose imports take seconds. A module of the command
line lists what it needs at its top: for readers and mypy under TYPE_CHECKING, at run time by `lazy`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from pipeline.ranks.collector import importing


class Lazy:
    """A proxy of a module, which is imported at the first access to an attribute."""

    def __init__(self, module: str) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        if self.module in sys.modules:
            return getattr(importlib.import_module(self.module), name)  # which waits for another thread's import
        with importing():
            return getattr(importlib.import_module(self.module), name)


def lazy(module: str) -> Any:
    """Return a proxy of the module of that name."""
    return Lazy(module)
