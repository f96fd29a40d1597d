"""Recipes: everything that a run depends on. `load_recipe` is the stable name for programs outside the repository."""

from pipeline.config.load import load_recipe

__all__ = ["load_recipe"]
