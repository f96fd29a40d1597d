"""The learner: everything that a stage trains, and the terms by which it is trained beside the answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.data.selection import Selection
from pipeline.prompts.heads import ProjectionHead
from pipeline.prompts.parts.base import Part
from pipeline.prompts.parts.input_rows import InputRows
from pipeline.prompts.terms import PrototypeTerm, Term
from pipeline.training.engine import Group

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM


class Learner(nn.Module):
    """The parts of the current stage, by name, and the terms of its loss.

    The part named "module" is what samples select later; modules of the earlier stages are the `bank`, tensors
    [t-1, ...] by name that no optimizer can reach.
    """

    def __init__(self, parts: Mapping[str, Part], terms: Sequence[Term] = ()) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.terms = tuple(terms)
        self.bank: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def all_parts(self) -> list[Part]:
        """The parts, in the order in which their values start and their groups are optimised."""
        return list(self.parts.values())  # type: ignore[arg-type]

    @property
    def insertion(self) -> str | None:
        """Where rows stand; None without rows."""
        insertion: str | None = self["module"].insertion if "module" in self.parts else None
        return insertion

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the further terms."""
        return tuple(name for term in self.terms for name in term.names)

    def trainables(self) -> dict[str, nn.Parameter]:
        """All parameters that learn, by the names that files have for them."""
        return {name: value for part in self.all_parts() for name, value in part.trainables().items()}

    def groups(self, train: Any) -> list[Group]:
        """The parameters with the learning rates that a recipe's `train` has for them."""
        parts = self.all_parts()
        return [Group(list(part.trainables().values()), getattr(train, part.rate)) for part in parts]

    def start(self, lmm: LMM, seed: int, stage: int, previous: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Starting values of a stage's trainables, a function of (seed, stage) and of what the stage before learned.

        Args:
            lmm: the frozen model; under ZeRO-3 all ranks call this.
            seed: the run's.
            stage: its number, from 0.
            previous: what the stage before learned, by name; None before the first.
        """
        generator = torch.Generator().manual_seed((seed * 1_000_003 + stage) % 2**63)
        values: dict[str, Tensor] = {}
        for part in self.all_parts():
            values |= part.start(lmm, generator, previous or {})
        return values

    def start_stage(self, bank: Mapping[str, Tensor]) -> None:
        """Set the earlier modules [t-1, ...] by name that samples of this stage may get; empty for none."""
        parameter = next(iter(self["module"].trainables().values()))
        # No copy where it is there already: modules of a pool never change in place, and 1,024 of them are large.
        kind = {"device": parameter.device, "dtype": parameter.dtype}
        self.bank = {name: value.detach().to(**kind) for name, value in bank.items()}

    def finish(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a learned router keeps of a stage's final values, by name."""
        return {name: value for part in self.all_parts() for name, value in part.finish(values).items()}

    def rows(self, selection: Selection) -> tuple[Tensor, Tensor] | None:
        """Vectors [B, P, D] for the input of each sample and their validity [B, P]; None without rows."""
        if self.insertion is None:
            return None
        rows: tuple[Tensor, Tensor] = self["module"](self.bank.get("prompt"), selection)
        return rows

    @contextlib.contextmanager
    def attached(self, lmm: LMM, selection: Selection) -> Iterator[None]:
        """A context for calls of the decoder on a batch, in which all parts' modules act on it."""
        with contextlib.ExitStack() as stack:
            for part in self.all_parts():
                stack.enter_context(part.attached(lmm, self.bank, selection))
            yield


def prompt_learner(
    lmm: LMM, length: int, key_width: int, insertion: str = "after_bos", init: str = "vocab_rows", weight: float = 1.0
) -> Learner:
    """ModalPrompt's: a prompt set of `length` vectors, the head that maps it to its prototype [`key_width`], and the
    prototype terms times `weight`."""
    head = ProjectionHead(lmm.width, key_width, dtype=lmm.dtype)
    return Learner({"module": InputRows(lmm, length, insertion, init), "head": head}, [PrototypeTerm(weight)])
