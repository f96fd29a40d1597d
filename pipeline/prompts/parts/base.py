"""What the kinds of parts have in common: parameters of the current stage, and how modules enter the frozen model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.config import registry
from pipeline.data.selection import NO_SET, Selection

if TYPE_CHECKING:
    from pipeline.backbones.decoding import Attached
    from pipeline.backbones.lmm import LMM


class Entry:
    """How finished modules of one kind enter the frozen model at inference; as it stands, not at all.

    It holds settings and no parameters: the modules are given with each call.
    """

    insertion: str | None = None  # where rows stand among the input embeddings; None: there are none
    attaches: ClassVar[bool] = False  # whether `attached` changes what the decoder computes

    def attached(self, lmm: LMM, tensors: Mapping[str, Tensor], selection: Selection) -> AbstractContextManager[None]:
        """A context for one or more calls of the decoder on a batch.

        Args:
            lmm: the frozen model.
            tensors: M modules' tensors [M, ...] by name, on the model's device and in its precision.
            selection: of each row of the decoder's batch, numbers among the M.
        """
        return nullcontext()


class Part(nn.Module):
    """Parameters of the current stage, of a kind that a method names; see `pipeline.config.registry`, parts.

    A parameter is read in the `forward` of the module that owns it and nowhere else: ZeRO-3 gathers it there.
    """

    prefix: ClassVar[str] = ""  # how the names of its parameters begin in files
    rate: ClassVar[str] = "lr_prompt"  # the field of the recipe's `train` with their learning rate
    insertion: str | None = None  # where its rows stand among the input embeddings; None: it has none

    @classmethod
    def of(cls, lmm: LMM, method: Any) -> Part:
        """The part of a method's options, on a frozen model."""
        raise NotImplementedError

    @classmethod
    def entry(cls, method: Any) -> Entry:
        """How finished modules of a method enter."""
        raise NotImplementedError

    def trainables(self) -> dict[str, nn.Parameter]:
        """Its parameters by the names that files have for them."""
        return {self.prefix + name: parameter for name, parameter in self.named_parameters()}

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Starting values in float32, by the names of `trainables`; the same on every rank.

        Args:
            lmm: the frozen model; under ZeRO-3 all ranks call this.
            generator: seeded with the run's seed and the stage's number, and used by the parts in turn.
            previous: what the stage before learned, by the same names; empty before the first.
        """
        raise NotImplementedError

    def finish(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a learned router keeps of a stage's final values, by name."""
        return {}

    def attached(self, lmm: LMM, bank: Mapping[str, Tensor], selection: Selection) -> AbstractContextManager[None]:
        """As `Entry.attached`, with the current stage's module beside the selected ones of the `bank` [t-1, ...]."""
        return nullcontext()


def entry_of(method: Any) -> Entry:
    """How what a method has learned enters the frozen model."""
    if method.part is None:
        return Entry()
    entry: Entry = registry.load("parts", method.part).entry(method)
    return entry


def attachment(lmm: LMM, entry: Entry, tensors: Mapping[str, Tensor]) -> Attached | None:
    """What a decoder needs to give each row its own of these modules; None for a kind that attaches nothing to it."""
    return functools.partial(entry.attached, lmm, tensors) if entry.attaches else None


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's whole shape, whether or not ZeRO-3 has partitioned it, which leaves it an empty one."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def with_own(bank: Tensor | None, own: Tensor, selection: Selection) -> tuple[Tensor, Selection]:
    """The modules of a batch and who gets which: the selected ones of the `bank` [t-1, ...], then the current one.

    Only the modules of this batch are joined with the current one [...]: the cost does not grow with the pool.
    """
    chosen = selection.numbers
    used = own[None][:0] if bank is None or not chosen.numel() else bank[chosen.clamp(min=0).flatten()]
    numbers = torch.arange(chosen.numel(), device=chosen.device).reshape(chosen.shape)
    last = chosen.new_full((len(chosen), 1), len(used))
    numbers = torch.cat([numbers.masked_fill(chosen == NO_SET, NO_SET), last], dim=1)
    weights = selection.weights
    if weights is not None:
        weights = torch.cat([weights, weights.new_ones(len(weights), 1)], dim=1)
    return torch.cat([used, own[None]]), Selection(numbers, weights)
