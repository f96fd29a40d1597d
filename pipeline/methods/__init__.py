"""The methods, one small file each; their names are in `pipeline.config.registry`."""

from __future__ import annotations

from pipeline.config import registry
from pipeline.config.method import MethodOptions
from pipeline.methods.base import Method, Stage

__all__ = ["Method", "Stage", "make_method"]


def make_method(options: MethodOptions) -> Method:
    """The method that a recipe names; an unknown name is a UserError with the nearest valid one."""
    method: Method = registry.load("methods", options.name)(options)
    return method
