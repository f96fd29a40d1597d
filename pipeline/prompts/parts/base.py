"""What the kinds of parts have in common: parameters of the current stage, and how modules enter the frozen model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.config import registry
from pipeline.config.base import Section
from pipeline.config.method import choice_name, chosen_options
from pipeline.data.selection import NO_SET, Selection
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.backbones.decoding import Attached
    from pipeline.backbones.lmm import LMM
    from pipeline.data.collate import Batch
    from pipeline.prompts.parts.shapes import DecoderShape

SHARED = "shared."  # how the names begin of what all modules have in common, as the last stage left it


class Entry:
    """How finished modules of one kind enter the frozen model at inference; as it stands, not at all.

    It holds settings and no parameters: the modules are given with each call.
    """

    insertion: str | None = None  # where rows stand among the input embeddings; None: there are none
    attaches: ClassVar[bool] = False  # whether `attached` changes what the decoder computes
    follows_rows: ClassVar[bool] = False  # whether `attached` has to be told where the inserted rows stand

    @property
    def changes_images(self) -> bool:
        """Whether what the decoder makes of an image depends on a sample's modules other than by rows before it."""
        return self.attaches

    def updates_inputs(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `attached` acts on the input embeddings too, which are computed before the decoder runs."""
        return False

    def length(self, tensors: Mapping[str, Tensor]) -> int:
        """Columns that one module takes in the sequence."""
        return 0

    def rows(self, tensors: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Vectors [B, P, D] for the input of each sample and their validity [B, P]; None where nothing is inserted."""
        return None

    def chosen(self, tensors: Mapping[str, Tensor], batch: Batch) -> Selection:
        """What `attached` is given for the samples of a batch; the default is their selection of modules."""
        return batch.selection

    def attached(
        self, lmm: LMM, tensors: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """A context for one or more calls of the decoder on a batch.

        Args:
            lmm: the frozen model.
            tensors: M modules' tensors [M, ...] by name, on the model's device and in its precision.
            selection: of each row of the decoder's batch, numbers among the M.
            inserted: for an entry that `follows_rows`, of each column of the sequence the number from 1 of the row
                that `rows` gave for it, 0 for others [B, S]; None where nothing is inserted.
        """
        return nullcontext()

    def on(self, lmm: LMM, tensors: Mapping[str, Tensor]) -> Attached | None:
        """`attached` for many calls with the same modules, by the selection alone; None: nothing is attached."""
        return functools.partial(self.attached, lmm, tensors) if self.attaches else None


class Part(nn.Module):
    """Parameters of the current stage, of a kind that a method names; see `pipeline.config.registry`, parts.

    `Options` are what a recipe may say: fields of the same names in the method's options are handed to the part.
    `length`, `sizes` and `read` are what the memory plan, and a budget of trained values, are told before there is a
    model.

    A parameter is read in the `forward` of the module that owns it and nowhere else: ZeRO-3 gathers it there.
    """

    Options: ClassVar[type[Section]] = Section
    prefix: ClassVar[str] = ""  # how the names of its parameters begin in files
    rate: ClassVar[str] = "lr_prompt"  # the field of the recipe's `train` with their learning rate
    sized_by: ClassVar[str] = ""  # the option that a budget of trained values sets; `sizes` must not fall as it grows
    keeps_ratio: ClassVar[tuple[str, ...]] = ()  # options that a budget keeps in proportion to that one
    insertion: str | None = None  # where its rows stand among the input embeddings; None: it has none
    follows_rows: ClassVar[bool] = False  # whether `attached` has to be told where its rows stand
    learns_key: ClassVar[bool] = False  # whether it learns the state of a router that is learned in the module

    @classmethod
    def of(cls, lmm: LMM, method: Any) -> Part:
        """The part of a method's options, on a frozen model."""
        raise NotImplementedError

    @classmethod
    def keyed(cls, lmm: LMM, method: Any, key_width: int) -> Part:
        """As `of`, for a part that compares something with the samples' routing keys [`key_width`]."""
        return cls.of(lmm, method)

    @classmethod
    def entry(cls, method: Any) -> Entry:
        """How finished modules of a method enter."""
        raise NotImplementedError

    @classmethod
    def require_attention(cls, method: Any, implementation: str) -> None:
        """Raise UserError where the model's attention (`model.attn_implementation`) cannot do what the part needs."""

    @classmethod
    def changes_shared(cls, method: Any) -> bool:
        """Whether every stage goes on training what all modules have in common, and with it the earlier ones."""
        return False

    @classmethod
    def keeps(cls, name: str) -> bool:
        """Whether a finished module of this kind has a tensor of this name; an adapter with others is refused."""
        return name.startswith(cls.prefix)

    @classmethod
    def options(cls, method: Any) -> Any:
        """The part's own options: those beside its name, and the method's of the same names."""
        return chosen_options("parts", cls.Options, method.part, method.options)

    @classmethod
    def length(cls, method: Any) -> int:
        """Vectors that one module inserts into the sequence."""
        return 0

    @classmethod
    def sizes(cls, method: Any, shape: DecoderShape) -> list[int]:
        """Numbers of elements of the parameters that a stage trains; UserError where they do not fit the decoder."""
        return []

    @property
    def updates_output(self) -> bool:
        """Whether `attached` acts on the output layer too."""
        return False

    @property
    def updates_inputs(self) -> bool:
        """Whether `attached` acts on the input embeddings too, which are computed before the decoder runs."""
        return False

    @classmethod
    def size_step(cls, method: Any) -> int:
        """What the option `sized_by` is a multiple of."""
        return 1

    @classmethod
    def stored(cls, method: Any, shape: DecoderShape) -> int:
        """Number of elements that one task adds to the pool."""
        return sum(cls.sizes(method, shape))

    @classmethod
    def read(cls, method: Any, shape: DecoderShape) -> int:
        """Elements per token, in all layers together, that frozen layers would not keep for the backward pass."""
        return 0

    @classmethod
    def adds_to_logits(cls, method: Any, shape: DecoderShape) -> bool:
        """Whether what it adds to the output layer's scores takes memory of their size."""
        return False

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

    def outcome(self, values: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a stage's file holds of its final values; the default is the values as they are.

        Names that begin with `SHARED` are not the module's: all modules have them in common, as
        the last stage left them.

        Args:
            values: final values in float32, by the names of `trainables`.
            previous: what the stage before left, as for `start`.
        """
        return dict(values)

    def key_distances(self, batch: Batch) -> Tensor:
        """Of each sample [B], the sum of 1 - cos(query, key) over the learned keys that were chosen for it."""
        raise NotImplementedError

    def rows(self, bank: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor] | None:
        """As `Entry.rows`, with the current stage's module behind the selected ones of the `bank`."""
        return None

    def begin(self, bank: Mapping[str, Tensor]) -> None:
        """Be told what earlier stages left, before `start`; see `Learner.start_stage`."""

    def chosen(self, bank: Mapping[str, Tensor], batch: Batch) -> Selection:
        """As `Entry.chosen`, with the current stage's module beside the selected ones of the `bank`."""
        return batch.selection

    def attached(
        self, lmm: LMM, bank: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        """As `Entry.attached`, with the current stage's module beside the selected ones of the `bank`.

        The bank has the earlier modules [t-1, ...], and what they share, by name.
        """
        return nullcontext()


def entry_of(method: Any) -> Entry:
    """How what a method has learned enters the frozen model."""
    return Entry() if method.part is None else kind_of(method).entry(method)


def kind_of(method: Any) -> type[Part]:
    """The class of a method's part; `Part` itself, which trains nothing, for a method without one."""
    kind: type[Part] = Part if method.part is None else registry.load("parts", choice_name(method.part))
    return kind


def require_alone(selection: Selection, kind: str) -> None:
    """Raise UserError where modules of a kind that is trained alone are to be trained beside earlier ones."""
    if selection.width:
        raise UserError(
            f"Modules of the part {kind} are trained alone, and the method's rule gives samples earlier modules in "
            "training; expected a rule that does so at inference only."
        )


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
