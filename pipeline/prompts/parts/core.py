"""Cores in frozen bases: y = W x + (alpha / rank) * U (sum_i w_i C_i) V x, of which a later stage trains C alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.config.low_rank import LowRankOptions
from pipeline.data.selection import Selection
from pipeline.prompts.parts.base import Entry, require_alone, shape_of
from pipeline.prompts.parts.dropout import Dropout
from pipeline.prompts.parts.low_rank import LinearUpdates, LowRankEntry, added_to_outputs
from pipeline.prompts.parts.mixture import Mixture
from pipeline.prompts.parts.targets import linear_layers, sides, updated_linears

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM
    from pipeline.prompts.parts.shapes import DecoderShape

PREFIX, BASES = "core.", "shared.core."  # of what a task has, and of what all have in common
A, B, C = ".a", ".b", ".c"
U, V = ".u", ".v"


class CoreEntry(LowRankEntry):
    """Each row's cores, summed by their weights, act between the bases of the layers that the tensors name."""

    prefix = PREFIX

    def layers(self, tensors: Mapping[str, Tensor]) -> list[str]:
        return [name.removeprefix(PREFIX).removesuffix(C) for name in tensors if name.startswith(PREFIX)]

    def output(self, mixture: Mixture, tensors: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
        cores, u, v = tensors[PREFIX + name + C], tensors[BASES + name + U], tensors[BASES + name + V]
        weights = mixture.weights.to(cores.dtype)[:, :, None, None]
        own = (cores[mixture.numbers] * weights).sum(1)  # [B, r, r]; small, so each row's own are gathered
        return inputs @ v.T @ own.transpose(1, 2) @ u.T * self.scale


class CoreUpdate(nn.Module):
    """The current stage's trainables of one layer: A [r, inputs] and B [outputs, r] in the first, C [r, r] later."""

    def __init__(self, inputs: int, outputs: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, inputs, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype))
        self.c = nn.Parameter(torch.zeros(rank, rank, dtype=dtype))

    def forward(self, inputs: Tensor, u: Tensor | None, v: Tensor | None) -> Tensor:
        """What it adds [B, N, outputs], unscaled, in these bases; without them, in the first stage, B A x."""
        # What a stage does not train gets a gradient of zero: ZeRO-3 would count the last one it got in the norm.
        if u is None or v is None:
            return inputs @ self.a.T @ self.b.T + 0.0 * self.c.sum()
        return inputs @ v.T @ self.c.T @ u.T + 0.0 * (self.a.sum() + self.b.sum())


class Core(LinearUpdates):
    """The first stage trains a LoRA, whose singular vectors become the bases; later ones train a core [r, r] each.

    Parameters keep their shapes in all stages (see `Engine`), so those that a stage does not train are there, unused.
    With `carried` a later stage goes on from the core of the one before.
    """

    Options = LowRankOptions
    prefix = PREFIX
    sized_by, keeps_ratio = "rank", ("alpha",)

    def __init__(self, lmm: LMM, options: LowRankOptions, carried: bool = False) -> None:
        super().__init__()
        self.carried = carried
        self.scale, self.layers = options.scale, linear_layers(lmm, options.targets)
        self.dropout = Dropout(options.dropout)
        self.updates = nn.ModuleList(
            CoreUpdate(*sides(layer), options.rank, lmm.dtype) for layer in self.layers.values()
        )

    @classmethod
    def of(cls, lmm: LMM, method: Any) -> Core:
        return cls(lmm, cls.options(method), method.carries_prompt)

    @classmethod
    def entry(cls, method: Any) -> Entry:
        return CoreEntry(cls.options(method).scale)

    @classmethod
    def sizes(cls, method: Any, shape: DecoderShape) -> list[int]:
        rank, linears = cls.options(method).rank, updated_linears(cls.options(method).targets, shape)
        return [size for one in linears for size in (rank * one.inputs, rank * one.outputs, rank * rank)]

    @classmethod
    def stored(cls, method: Any, shape: DecoderShape) -> int:
        linears = updated_linears(cls.options(method).targets, shape)
        return int(cls.options(method).rank ** 2 * len(linears))

    def trainables(self) -> dict[str, nn.Parameter]:
        pairs = zip(self.layers, self.updates, strict=True)
        return {PREFIX + name + end: getattr(update, end[1:]) for name, update in pairs for end in (A, B, C)}

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A uniform within 1 / sqrt(inputs), B and C zero: every stage begins with the frozen model, unless carried."""
        values = {}
        for name, parameter in self.trainables().items():
            shape = shape_of(parameter)
            uniform = (torch.rand(shape, generator=generator) * 2 - 1) * shape[1] ** -0.5
            values[name] = uniform if name.endswith(A) else torch.zeros(shape)
        self.dropout.begin(generator)
        if self.carried:
            values |= {name: previous[name].clone() for name in values if name in previous}
        return values

    def outcome(self, values: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The core and the bases: after the first stage those of the singular value decomposition of B A."""
        found: dict[str, Tensor] = {}
        for name in self.layers:
            if BASES + name + U in previous:
                kept = {BASES + name + end: previous[BASES + name + end] for end in (U, V)}
                found |= {PREFIX + name + C: values[PREFIX + name + C], **kept}
                continue
            u, core, v = decomposed(values[PREFIX + name + A], values[PREFIX + name + B])
            found |= {PREFIX + name + C: core, BASES + name + U: u, BASES + name + V: v}
        return found

    def attached(
        self, lmm: LMM, bank: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        require_alone(selection, "core")

        def update(number: int, name: str, module: nn.Module, inputs: Tensor) -> Tensor:
            read = self.dropout(inputs, selection.places, number)
            output: Tensor = module(read, bank.get(BASES + name + U), bank.get(BASES + name + V)) * self.scale
            return output

        own = zip(self.layers, self.updates, strict=True)
        updates = [functools.partial(update, number, *pair) for number, pair in enumerate(own)]
        return added_to_outputs(zip(self.layers.values(), updates, strict=True))


def decomposed(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [outputs, r], a diagonal core [r, r] and V [r, inputs] with U C V = B A, of `a` [r, inputs] and `b`.

    By two QR decompositions, so that the product [outputs, inputs] is never made. Where B A has less than full rank,
    the bases have the remaining directions of B and A, which later cores may use.
    """
    left, right = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
    u, values, v = torch.linalg.svd(left.R @ right.R.T)
    u, v = left.Q @ u, v @ right.Q.T
    signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()  # a pair's sign is free: that of V's largest entry is 1
    u, v = u * signs.T, v * signs
    return u.float(), values.diag().float(), v.float()
