"""Recipes: everything that a run depends on. `load_recipe` is the stable name for programs outside the repository.

It is imported on first use, because the command line reads names of recipes without the recipes' classes.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config.load import load_recipe as load_recipe


def __getattr__(name: str) -> Any:
    if name == "load_recipe":
        return importlib.import_module("pipeline.config.load").load_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
