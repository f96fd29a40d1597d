"""Mixtures of low-rank experts on linear layers of the decoder, which a router in the layer weighs by token."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.low_rank import LowRankOptions
from pipeline.data.selection import Selection
from pipeline.prompts.parts.base import Entry, require_alone, shape_of
from pipeline.prompts.parts.dropout import Dropout
from pipeline.prompts.parts.low_rank import A, B, LinearUpdates, LowRankEntry, added_to_outputs
from pipeline.prompts.parts.mixture import Mixture, weighted_sum
from pipeline.prompts.parts.targets import inputs_read, linear_layers, sides, updated_linears

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM
    from pipeline.prompts.parts.shapes import DecoderShape

PREFIX, ROUTER = "experts.", ".router"
Mix = Literal["expert", "factors"]


class ExpertsOptions(LowRankOptions):
    """How many experts share the rank, and what is mixed."""

    experts: int = Field(4, ge=1, description="experts per layer, each of rank / experts, rounded up")
    mix: Mix = Field("expert", description="see the method moelora")

    @property
    def own_rank(self) -> int:
        """That of each expert."""
        return -(-self.rank // self.experts)


def mixed(inputs: Tensor, a: Tensor, b: Tensor, router: Tensor, mix: Mix, read: Tensor | None = None) -> Tensor:
    """What the experts add [B, N, outputs], unscaled: `a` [E, r, D], `b` [E, outputs, r], `router` [E, D].

    The router reads the `inputs` [B, N, D]; the experts may `read` these with some numbers dropped.
    """
    shares = torch.softmax((inputs @ router.T).float(), dim=-1).to(inputs.dtype)  # [B, N, E]
    down, up = a.flatten(0, 1).T, b.transpose(1, 2).flatten(0, 1)
    read = inputs if read is None else read
    if mix == "expert":
        return weighted_sum(read, down, up, shares)
    hidden = ((read @ down).unflatten(-1, a.shape[:2]) * shares[..., None]).sum(-2)  # [B, N, r]
    return (hidden[..., None, :] * shares[..., None]).flatten(-2) @ up


class ExpertsEntry(LowRankEntry):
    """Each row's own mixtures, usually one, are added to the outputs of the layers that the tensors name."""

    prefix = PREFIX

    def __init__(self, scale: float, mix: Mix) -> None:
        super().__init__(scale)
        self.mix = mix

    def output(self, mixture: Mixture, tensors: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
        a, b, router = (tensors[PREFIX + name + end] for end in (A, B, ROUTER))
        used = range(len(a)) if mixture.used is None else mixture.used.tolist()
        total = inputs.new_zeros(())
        for place, number in enumerate(used):
            found = mixed(inputs, a[number], b[number], router[number], self.mix)
            weight = None if mixture.share is None else mixture.share[:, place, None, None].to(found.dtype)
            total = total + (found if weight is None else found * weight)
        return total * self.scale


class ExpertsUpdate(nn.Module):
    """The current stage's experts of one layer, and their router."""

    def __init__(self, inputs: int, outputs: int, options: ExpertsOptions, dtype: torch.dtype) -> None:
        super().__init__()
        experts, rank = options.experts, options.own_rank
        self.mix: Mix = options.mix
        self.a = nn.Parameter(torch.zeros(experts, rank, inputs, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(experts, outputs, rank, dtype=dtype))
        self.router = nn.Parameter(torch.zeros(experts, inputs, dtype=dtype))

    def forward(self, inputs: Tensor, read: Tensor) -> Tensor:
        """What they add [B, N, outputs], unscaled; see `mixed`."""
        return mixed(inputs, self.a, self.b, self.router, self.mix, read)


class Experts(LinearUpdates):
    """Experts and routers on the decoder's linear layers whose names end in one of the targets.

    An update counts alpha / rank times, `rank` being that of all experts together, as in CoIN.
    """

    Options = ExpertsOptions
    prefix = PREFIX
    sized_by, keeps_ratio = "rank", ("alpha",)

    def __init__(self, lmm: LMM, options: ExpertsOptions, carried: bool = False) -> None:
        super().__init__()
        self.scale, self.carried, self.dropout = options.scale, carried, Dropout(options.dropout)
        self.layers = linear_layers(lmm, options.targets)
        self.updates = nn.ModuleList(ExpertsUpdate(*sides(layer), options, lmm.dtype) for layer in self.layers.values())

    @classmethod
    def of(cls, lmm: LMM, method: Any) -> Experts:
        return cls(lmm, cls.options(method), method.carries_prompt)

    @classmethod
    def entry(cls, method: Any) -> Entry:
        options = cls.options(method)
        return ExpertsEntry(options.scale, options.mix)

    @classmethod
    def size_step(cls, method: Any) -> int:
        return int(cls.options(method).experts)

    @classmethod
    def sizes(cls, method: Any, shape: DecoderShape) -> list[int]:
        options, linears = cls.options(method), updated_linears(cls.options(method).targets, shape)
        rank, experts = options.own_rank * options.experts, options.experts
        return [size for one in linears for size in (rank * one.inputs, rank * one.outputs, experts * one.inputs)]

    @classmethod
    def read(cls, method: Any, shape: DecoderShape) -> int:
        options = cls.options(method)
        dropped = inputs_read(options, shape)
        # The router reads what is not dropped.
        return dropped + inputs_read(options.model_copy(update={"dropout": 0.0}), shape) if options.dropout else dropped

    def trainables(self) -> dict[str, nn.Parameter]:
        pairs = zip(self.layers, self.updates, strict=True)
        return {PREFIX + name + end: getattr(update, end[1:]) for name, update in pairs for end in (A, B, ROUTER)}

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A normal of deviation 0.01 and B zero, as CoIN starts them; a router uniform within 1 / sqrt(inputs)."""
        values = {}
        for name, parameter in self.trainables().items():
            shape = shape_of(parameter)
            if name.endswith(ROUTER):
                values[name] = (torch.rand(shape, generator=generator) * 2 - 1) * shape[-1] ** -0.5
            else:
                values[name] = torch.randn(shape, generator=generator) * (0.01 if name.endswith(A) else 0.0)
        self.dropout.begin(generator)
        return {name: previous[name].clone() for name in values} if self.carried and previous else values

    def attached(
        self, lmm: LMM, bank: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        require_alone(selection, "experts")

        def update(number: int, module: nn.Module, inputs: Tensor) -> Tensor:
            output: Tensor = module(inputs, self.dropout(inputs, selection.places, number)) * self.scale
            return output

        pairs = enumerate(zip(self.layers.values(), self.updates, strict=True))
        return added_to_outputs((layer, functools.partial(update, number, own)) for number, (layer, own) in pairs)
