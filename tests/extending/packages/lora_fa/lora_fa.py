"""A method: LoRA-FA (arXiv 2308.03303) per task; A is random, frozen and one for all tasks, and a stage trains B."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.low_rank import LowRankOptions
from pipeline.data.selection import Selection
from pipeline.methods.task_lora import TaskLora
from pipeline.prompts.parts.base import SHARED, Part, require_alone, shape_of
from pipeline.prompts.parts.dropout import Dropout
from pipeline.prompts.parts.low_rank import LowRankEntry, added_to_outputs
from pipeline.prompts.parts.mixture import Mixture
from pipeline.prompts.parts.targets import linear_layers, updated_linears

# How names begin in files, before the name of a layer: of a task's B [outputs, r] and of the common A [r, inputs].
B, A = "lora_fa.", SHARED + "lora_fa."


class LoraFA(TaskLora):
    """As task_lora, with its options, router and rule."""

    part = "lora_fa"


class FixedAEntry(LowRankEntry):
    """Each sample's B, or several of them by their weights, read what the common A makes of a layer's input."""

    prefix = B

    def layers(self, tensors: Mapping[str, Tensor]) -> list[str]:
        return [name.removeprefix(B) for name in tensors if name.startswith(B)]

    def output(self, mixture: Mixture, tensors: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
        chosen = tensors[B + name][mixture.numbers]  # [batch, m, outputs, r]
        own = (chosen * mixture.weights.to(chosen.dtype)[:, :, None, None]).sum(1)
        return inputs @ tensors[A + name].T @ own.transpose(1, 2) * self.scale


class Up(nn.Module):
    """The current stage's B of one layer."""

    def __init__(self, outputs: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ self.b.T


class FixedA(Part):
    """The B of one task. A is no parameter: nothing trains or partitions it, and the first stage's run draws it."""

    Options = LowRankOptions
    prefix = B
    sized_by, keeps_ratio = "rank", ("alpha",)

    def __init__(self, lmm: Any, options: LowRankOptions) -> None:
        super().__init__()
        self.chosen_options, self.dropout = options, Dropout(options.dropout)
        self.linears = linear_layers(lmm, options.targets)
        self.ups = nn.ModuleList(Up(one.out_features, options.rank, lmm.dtype) for one in self.linears.values())
        self.fixed: dict[str, Tensor] = {}

    @classmethod
    def of(cls, lmm: Any, method: Any) -> FixedA:
        return cls(lmm, cls.options(method))

    @classmethod
    def entry(cls, method: Any) -> FixedAEntry:
        return FixedAEntry(cls.options(method).scale)

    @classmethod
    def sizes(cls, method: Any, shape: Any) -> list[int]:
        options = cls.options(method)
        return [options.rank * one.outputs for one in updated_linears(options.targets, shape)]

    @classmethod
    def read(cls, method: Any, shape: Any) -> int:
        options = cls.options(method)  # the gradient of B needs r numbers of a token, not the layer's whole input
        return options.rank * len(updated_linears(options.targets, shape))

    @property
    def updates_output(self) -> bool:
        return "lm_head" in self.linears

    def trainables(self) -> dict[str, nn.Parameter]:
        return {B + name: up.get_parameter("b") for name, up in zip(self.linears, self.ups, strict=True)}

    def start(self, lmm: Any, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for (name, layer), up in zip(self.linears.items(), self.ups, strict=True):
            shape = self.chosen_options.rank, layer.in_features
            drawn = (torch.rand(shape, generator=generator) * 2 - 1) * layer.in_features**-0.5
            b = up.get_parameter("b")
            self.fixed[name] = previous.get(A + name, drawn).to(b.device, b.dtype)
        self.dropout.begin(generator)
        return {name: torch.zeros(shape_of(value)) for name, value in self.trainables().items()}

    def outcome(self, values: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**values, **{A + name: previous.get(A + name, a.float().cpu()) for name, a in self.fixed.items()}}

    def attached(
        self, lmm: Any, bank: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        require_alone(selection, "lora_fa")

        def update(number: int, name: str, up: nn.Module, inputs: Tensor) -> Tensor:
            read = self.dropout(inputs, selection.places, number)
            output: Tensor = up(read @ self.fixed[name].T) * self.chosen_options.scale
            return output

        pairs = enumerate(zip(self.linears, self.ups, strict=True))
        updates = [functools.partial(update, number, *pair) for number, pair in pairs]
        return added_to_outputs(zip(self.linears.values(), updates, strict=True))
