"""The learner: everything that a stage trains, and the terms by which it is trained beside the answers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.data.selection import Selection
from pipeline.prompts.heads import ProjectionHead
from pipeline.prompts.parts.base import Entry, Part
from pipeline.prompts.parts.input_rows import InputRows
from pipeline.prompts.terms import PrototypeTerm, Term
from pipeline.training.engine import Group

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM
    from pipeline.data.collate import Batch


class Learner(nn.Module):
    """The parts of the current stage, by name, and the terms of its loss.

    The part named "module" is what samples select later. What earlier stages left is in the `bank`, which no optimizer
    can reach: tensors [t-1, ...] by name, and by names of their own what modules share and terms remember. `previous`
    is the last stage's module, where a term asks for it; it enters by the `entry`.
    """

    def __init__(self, parts: Mapping[str, Part], terms: Sequence[Term] = (), entry: Entry | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.terms, self.entry = tuple(terms), entry or Entry()
        self.bank: dict[str, Tensor] = {}
        self.previous: dict[str, Tensor] = {}
        self._as_before = False

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

    @property
    def uses_bank(self) -> bool:
        """Whether a term looks at all earlier modules."""
        return any(term.uses_bank for term in self.terms)

    @property
    def uses_previous(self) -> bool:
        """Whether a term asks for the last stage's module."""
        return any(term.uses_previous for term in self.terms)

    def start_stage(self, bank: Mapping[str, Tensor], previous: Mapping[str, Tensor] | None = None) -> None:
        """Set what earlier stages left, by name.

        Args:
            bank: the modules [t-1, ...] that samples or terms of this stage may use; and what all modules share.
            previous: the last stage's module; None before the first, or where no term asks for it.
        """
        parameter = next(iter(self["module"].trainables().values()))
        # No copy where it is there already: modules of a pool never change in place, and 1,024 of them are large.
        kind = {"device": parameter.device, "dtype": parameter.dtype}
        self.bank = {name: value.detach().to(**kind) for name, value in bank.items()}
        self.previous = {name: value.detach().to(**kind) for name, value in (previous or {}).items()}
        for part in self.all_parts():
            part.begin(self.bank)

    def finish(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a learned router keeps of a stage's final values, by name."""
        return {name: value for part in self.all_parts() for name, value in part.finish(values).items()}

    def outcome(self, values: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a stage's file holds of its final values; `previous` is what the stage before left."""
        found = dict(values)
        for part in self.all_parts():
            names = part.trainables()
            own = part.outcome({name: found.pop(name) for name in names}, previous)
            found |= own
        return found

    @property
    def follows_rows(self) -> bool:
        """Whether `attached` has to be told where the inserted rows stand."""
        return any(part.follows_rows for part in self.all_parts())

    @property
    def updates_output(self) -> bool:
        """Whether `attached` acts on the output layer too."""
        return any(part.updates_output for part in self.all_parts())

    @property
    def updates_inputs(self) -> bool:
        """Whether `attached` acts on the input embeddings too."""
        return any(part.updates_inputs for part in self.all_parts())

    def rows(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Vectors [B, P, D] for the input of each sample and their validity [B, P]; None without rows."""
        if self.insertion is None:
            return None
        if self._as_before:
            alone = replace(batch, selected=batch.selected.new_zeros(len(batch.ids), 1), selected_weights=None)
            return self.entry.rows({name: value[None] for name, value in self.previous.items()}, alone)
        rows: tuple[Tensor, Tensor] | None = self["module"].rows(self.bank, batch)
        return rows

    def chosen(self, batch: Batch) -> Selection:
        """What `attached` is given for a batch."""
        if "module" not in self.parts or self._as_before:
            return batch.selection
        chosen: Selection = self["module"].chosen(self.bank, batch)
        return chosen

    @contextlib.contextmanager
    def as_before(self) -> Iterator[None]:
        """While the block runs, the module that the stage before left acts in place of the current one."""
        self._as_before = True
        try:
            yield
        finally:
            self._as_before = False

    @contextlib.contextmanager
    def attached(self, lmm: LMM, selection: Selection, inserted: Tensor | None = None) -> Iterator[None]:
        """A context for calls of the decoder on a batch, in which all parts' modules act on it.

        The output layer is called in one of its own, whose selection has a row per token.
        """
        with contextlib.ExitStack() as stack:
            if self._as_before:
                alone = Selection(selection.numbers.new_zeros(len(selection), 1))
                before = {name: value[None] for name, value in self.previous.items()}
                stack.enter_context(self.entry.attached(lmm, before, alone, inserted))
                yield
                return
            for part in self.all_parts():
                stack.enter_context(part.attached(lmm, self.bank, selection, inserted))
            yield


def prompt_learner(
    lmm: LMM, length: int, key_width: int, insertion: str = "after_bos", init: str = "vocab_rows", weight: float = 1.0
) -> Learner:
    """ModalPrompt's: a prompt set of `length` vectors, the head that maps it to its prototype [`key_width`], and the
    prototype terms times `weight`."""
    head = ProjectionHead(lmm.width, key_width, dtype=lmm.dtype)
    return Learner({"module": InputRows(lmm, length, insertion, init), "head": head}, [PrototypeTerm(weight)])
