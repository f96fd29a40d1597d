"""Adapters: the learned pool as a portable folder, and answering with it.

`load_adapter` and `export` are stable names, which model cards and notebooks outside the repository import from here.
They are imported on first use, so that editing an adapter loads no model code. There is no __all__, because pdoc would
take the names in it for modules.
"""

import importlib
from typing import TYPE_CHECKING, Any

from pipeline.ranks.collector import importing

if TYPE_CHECKING:
    from pipeline.adapter.from_run import export as export
    from pipeline.adapter.load import load_adapter as load_adapter

STABLE = {"export": "pipeline.adapter.from_run", "load_adapter": "pipeline.adapter.load"}


def __getattr__(name: str) -> Any:
    if name in STABLE:
        with importing():
            return getattr(importlib.import_module(STABLE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
