"""Low-rank updates of linear layers of the decoder: y = W x + (alpha / rank) * sum_i w_i B_i A_i x, W frozen."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.data.selection import NO_SET, Selection
from pipeline.errors import UserError
from pipeline.prompts.parts.base import Entry, Part, shape_of, with_own

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM

PREFIX = "low_rank."
A, B = ".a", ".b"


class LowRankEntry(Entry):
    """Updates are added to the outputs of the layers that the tensors name, each row of the batch with its own."""

    attaches = True

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def attached(self, lmm: LMM, tensors: Mapping[str, Tensor], selection: Selection) -> AbstractContextManager[None]:
        # Tensors of no module [0, ...]: the rule chose none for any sample.
        ends = [name for name, value in tensors.items() if name.endswith(A) and len(value)]
        names = [name.removeprefix(PREFIX).removesuffix(A) for name in ends]
        if not selection.numbers.numel() or not names:
            return contextlib.nullcontext()

        def update(name: str, inputs: Tensor) -> Tensor:
            a, b = tensors[PREFIX + name + A], tensors[PREFIX + name + B]
            return low_rank_output(inputs, a, b, selection) * self.scale

        return added_to_outputs(lmm, {name: functools.partial(update, name) for name in names})


class LinearUpdate(nn.Module):
    """The current stage's update of one layer: A [r, inputs] and B [outputs, r]."""

    def __init__(self, inputs: int, outputs: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, inputs, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype))

    def forward(self, inputs: Tensor, bank: tuple[Tensor | None, Tensor | None], selection: Selection) -> Tensor:
        """What the selected earlier modules of the `bank` and the current one add [B, N, outputs], unscaled."""
        (a, mine), (b, _) = with_own(bank[0], self.a, selection), with_own(bank[1], self.b, selection)
        return low_rank_output(inputs, a, b, mine)


class LowRank(Part):
    """One LoRA (arXiv 2106.09685) per task on the decoder's linear layers whose names end in one of the `targets`.

    The frozen layers' own weights are not touched: ZeRO-3 has them partitioned, and a hook adds to their outputs.
    """

    prefix = PREFIX

    def __init__(self, lmm: LMM, targets: Sequence[str], rank: int, alpha: float) -> None:
        super().__init__()
        self.scale, self.layers = alpha / rank, linear_layers(lmm.decoder, targets)
        sizes = ((layer.in_features, layer.out_features) for layer in self.layers.values())
        self.updates = nn.ModuleList(LinearUpdate(*size, rank, lmm.dtype) for size in sizes)

    @classmethod
    def of(cls, lmm: LMM, method: Any) -> LowRank:
        """That of a method's options."""
        return cls(lmm, method.options.targets, method.options.rank, method.options.alpha)

    @classmethod
    def entry(cls, method: Any) -> Entry:
        """How finished modules of a method enter."""
        return LowRankEntry(method.options.alpha / method.options.rank)

    def trainables(self) -> dict[str, nn.Parameter]:
        pairs = zip(self.layers, self.updates, strict=True)
        return {PREFIX + name + end: getattr(update, end[1:]) for name, update in pairs for end in (A, B)}

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A uniform within 1 / sqrt(inputs), as PEFT starts it, and B zero: the first step is the frozen model's."""
        values = {}
        for name, parameter in self.trainables().items():
            shape = shape_of(parameter)
            uniform = (torch.rand(shape, generator=generator) * 2 - 1) * shape[1] ** -0.5
            values[name] = uniform if name.endswith(A) else torch.zeros(shape)
        return values

    def attached(self, lmm: LMM, bank: Mapping[str, Tensor], selection: Selection) -> AbstractContextManager[None]:
        def update(name: str, module: nn.Module, inputs: Tensor) -> Tensor:
            earlier = bank.get(PREFIX + name + A), bank.get(PREFIX + name + B)
            output: Tensor = module(inputs, earlier, selection) * self.scale
            return output

        pairs = zip(self.layers, self.updates, strict=True)
        return added_to_outputs(lmm, {name: functools.partial(update, name, module) for name, module in pairs})


def linear_layers(decoder: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The decoder's linear layers whose names end in a target; UserError for a target that no name ends in."""
    layers = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    return {name: layers[name] for name in ending_in(targets, layers)}


def ending_in(targets: Sequence[str], names: Iterable[str]) -> list[str]:
    """Those of the linear layers' names that end in a target; UserError for a target that no name ends in."""
    names = list(names)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise UserError(
                f"method.targets: no linear layer of the decoder ends in '{target}'; expected among {known}."
            )
    return [name for name in names if f".{name}".endswith(tuple(f".{target}" for target in targets))]


@contextlib.contextmanager
def added_to_outputs(lmm: LMM, updates: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """While the block runs, add to the outputs of these layers of the decoder what their updates make of the inputs."""

    def hook(update: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda _, inputs, output: output + update(inputs[0])

    decoder = lmm.decoder
    handles = [decoder.get_submodule(name).register_forward_hook(hook(update)) for name, update in updates.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def low_rank_output(inputs: Tensor, a: Tensor, b: Tensor, selection: Selection) -> Tensor:
    """sum_i w_i B_i A_i x [B, N, outputs] of inputs [B, N, D], `a` [M, r, D] and `b` [M, outputs, r].

    Where there are fewer modules than the batch selects, all are computed and those not selected weighted 0; otherwise
    each row's own are gathered, so that the cost does not grow with the pool.
    """
    numbers, weights = selection.numbers, selection.full_weights()
    rank, rows = a.shape[1], len(numbers)
    if len(a) <= numbers.numel():
        share = weights.new_zeros(rows, len(a)).scatter_add(1, numbers.clamp(min=0), weights)
        down, up = a.flatten(0, 1).T, b.transpose(1, 2).flatten(0, 1)  # [D, M * r], [M * r, outputs]
    else:
        chosen, share = numbers.masked_fill(numbers == NO_SET, 0), weights
        down, up = a[chosen].flatten(1, 2).transpose(1, 2), b[chosen].transpose(2, 3).flatten(1, 2)
    hidden = inputs @ down * share.to(inputs.dtype).repeat_interleave(rank, dim=1)[:, None]
    return hidden @ up
