"""Low-rank updates that are fused below the last layers and routed in these, as HiDe-LLaVA answers."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.low_rank import BEFORE_DECODER, OUTPUT_LAYER, LowRankOptions
from pipeline.data.selection import NO_SET, Selection
from pipeline.prompts.parts.base import Entry
from pipeline.prompts.parts.low_rank import LowRank, LowRankEntry, Update
from pipeline.prompts.parts.mixture import are_words, of_words, weighted, weighted_sum

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")  # the number of a decoder layer in a linear layer's name


class FusedOptions(LowRankOptions):
    """How modules act together."""

    fuse: Literal["product", "sum"] = Field("product", description="below the routed layers, see the method hide")
    routed_layers: int = Field(1, ge=0, description="the last so many layers are routed")


class FusedEntry(LowRankEntry):
    """In the last layers modules count by their weights; below, all that a row selects count alike, as one.

    The output layer goes with the last layer; what stands before the decoder is never routed. A
    row without any module is that of the frozen model.
    """

    def __init__(self, scale: float, fuse: str, routed_layers: int) -> None:
        super().__init__(scale)
        self.fuse, self.routed_layers = fuse, routed_layers

    def updates(self, names: Sequence[str], tensors: Mapping[str, Tensor], selection: Selection) -> list[Update]:
        routed = super().updates(names, tensors, selection)
        if not routed:
            return []
        numbers = [int(found[1]) if (found := LAYER.search(name)) else -1 for name in names]
        last = max(numbers)
        first = last + 1 - self.routed_layers
        numbers = [last if name == OUTPUT_LAYER else number for name, number in zip(names, numbers, strict=True)]
        present = present_in(selection, len(tensors[self.prefix + names[0] + ".a"]))
        alike = bool((present.any(1) == present.all(1)).all())  # a row has all modules or none, as of a rule for all
        fused = [functools.partial(self._fused, tensors, name, present, alike) for name in names]
        chosen = [number >= first and name not in BEFORE_DECODER for name, number in zip(names, numbers, strict=True)]
        return [routed[place] if one else fused[place] for place, one in enumerate(chosen)]

    def _fused(self, tensors: Mapping[str, Tensor], name: str, present: Tensor, alike: bool, inputs: Tensor) -> Tensor:
        a, b = tensors[self.prefix + name + ".a"], tensors[self.prefix + name + ".b"]
        if are_words(inputs):
            return self._fused_words(a, b, present, inputs) * self.scale
        if self.fuse == "sum":
            down, up = a.flatten(0, 1).T, b.transpose(1, 2).flatten(0, 1)
            return weighted_sum(inputs, down, up, present) * self.scale
        if alike:
            return weighted_sum(inputs, a.sum(0).T, b.sum(0).T, present[:, :1]) * self.scale
        own_a, own_b = (torch.einsum("bm,mxy->byx", present.to(one), one) for one in (a, b))
        return inputs @ own_a @ own_b * self.scale

    def _fused_words(self, a: Tensor, b: Tensor, present: Tensor, ids: Tensor) -> Tensor:
        """The same of token ids [B, N], unscaled."""
        hidden = of_words(ids, a, torch.arange(len(a), device=a.device))  # [B, N, M * r]
        if self.fuse == "sum":
            return weighted(hidden, b.transpose(1, 2).flatten(0, 1), present)
        own = present.to(hidden.dtype)
        joined = (hidden.unflatten(-1, a.shape[:2]) * own[:, None, :, None]).sum(2)  # [B, N, r]
        return joined @ torch.einsum("bm,mxy->byx", own, b)


def present_in(selection: Selection, modules: int) -> Tensor:
    """Which of so many modules the rows have [B, M], as 1 and 0."""
    chosen = (selection.numbers != NO_SET).float()
    return chosen.new_zeros(len(selection), modules).scatter_add(1, selection.numbers.clamp(min=0), chosen).clamp(max=1)


class FusedLowRank(LowRank):
    """Trained alone like any LoRA; only how finished modules enter differs."""

    Options = FusedOptions

    @classmethod
    def entry(cls, method: Any) -> Entry:
        options = cls.options(method)
        return FusedEntry(options.scale, options.fuse, options.routed_layers)
