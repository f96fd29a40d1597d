"""The frozen model's image projector, where a run trains it: one for all tasks, as the last stage left it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from pipeline.prompts.parts.base import Part

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM

PROJECTOR = "projector."  # how the names of its weights begin in files


class Projector(Part):
    """Lets the model's own projector learn.

    Its weights stay where they are in the model: a module that stands in two places of the tree would get DeepSpeed's
    hooks twice. The first stage starts from the checkpoint's values.
    """

    prefix = PROJECTOR
    rate: ClassVar[str] = "lr_projector"

    def __init__(self, lmm: LMM) -> None:
        super().__init__()
        self.checkpoint = lmm.projector_values()
        lmm.train_projector()
        self._weights = dict(lmm.projector().named_parameters())  # a dict: no submodule of this one

    def trainables(self) -> dict[str, nn.Parameter]:
        return {self.prefix + name: parameter for name, parameter in self._weights.items()}

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        checkpoint = {self.prefix + name: value for name, value in self.checkpoint.items()}
        return {name: previous.get(name, value) for name, value in checkpoint.items()}


def load_projector(lmm: LMM, shared: Mapping[str, Tensor]) -> None:
    """Give a whole model (not under ZeRO-3) the projector among these values, where there is one."""
    values = projector_of(shared)
    if values:
        lmm.load_projector(values)


def shared_projector(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A projector's weights by the names that they have in a pool; the inverse of `projector_of`."""
    return {PROJECTOR + name: value for name, value in values.items()}


def projector_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projector's weights among a stage's tensors, by their names in it."""
    return {name.removeprefix(PROJECTOR): value for name, value in tensors.items() if name.startswith(PROJECTOR)}
