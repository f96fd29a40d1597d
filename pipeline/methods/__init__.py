"""The methods by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import UserError, nearest
from pipeline.methods.base import Method, Stage
from pipeline.methods.independent import Independent
from pipeline.methods.joint import Joint
from pipeline.methods.modalprompt import ModalPrompt
from pipeline.methods.sequential import Sequential
from pipeline.methods.zero_shot import ZeroShot

if TYPE_CHECKING:
    from pipeline.config.method import MethodConfig

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (ModalPrompt, Sequential, Independent, Joint, ZeroShot)
}

__all__ = ["METHODS", "Method", "Stage", "make_method"]


def make_method(config: MethodConfig) -> Method:
    """The method that a recipe names; an unknown name is a UserError with the nearest valid one."""
    if config.name not in METHODS:
        raise UserError(
            f"There is no method '{config.name}'. Expected one of {', '.join(METHODS)}.{nearest(config.name, METHODS)}"
        )
    return METHODS[config.name](config)
