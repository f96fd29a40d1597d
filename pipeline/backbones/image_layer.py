"""The image projector as a layer that modules update."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backbones.families.base import LMMFamily


class ImageLayer(nn.Module):
    """The image projector as a layer that modules update, each row of a batch with its own.

    An update reads what the projector reads, at the places of the image tokens [B, N, V], and is added to the projected
    features there. The projector itself computes pictures, not rows.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs  # V, 0 where its inputs are not one per image token; D
        self.updates: list[Callable[[Tensor], Tensor]] = []

    def added(self, inputs: Tensor) -> Tensor:
        """The sum [B, N, D] of the updates of these inputs [B, N, V]."""
        return functools.reduce(torch.add, [update(inputs) for update in self.updates])

    @contextlib.contextmanager
    def updated(self, update: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While the block runs, this update acts too."""
        self.updates.append(update)
        try:
            yield
        finally:
            self.updates.remove(update)


def projector_input(model: Any, family: LMMFamily | type[LMMFamily]) -> int:
    """The width of what a model's image projector reads, which may be on the meta device; 0 where it does not map one
    feature to each image token."""
    if not family.keeps_features:
        return 0
    layers = model.model.get_submodule(family.projector).modules()
    return next((layer.in_features for layer in layers if isinstance(layer, nn.Linear)), 0)
