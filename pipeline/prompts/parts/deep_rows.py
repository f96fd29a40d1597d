"""Rows of every layer: a prompt set at the input, whose rows are removed, added and carried from layer to layer.

The schedule is that of Modular Prompt Learning (docs/design.md 5.4), applied to the decoder. A module takes as many
columns of the sequence as its largest number of rows in any layer. Its rows in a layer are the first of these columns;
the others are hidden from attention in that layer. So positions are the same in all layers, a cache has the same
columns in all layers, and where the number of rows is constant no mask changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.backbones.layer_hooks import (
    Change,
    LayerInputs,
    attention_of,
    changed_layers,
    full_mask,
    require_masks,
    require_usual_layers,
    without_keys,
)
from pipeline.backbones.prompt_schedule import LayerSchedule, ScheduleOptions
from pipeline.backbones.row_states import hidden_states_of
from pipeline.data.selection import Selection
from pipeline.errors import UserError
from pipeline.prompts.insertion import gather_sets
from pipeline.prompts.parts.base import shape_of, with_own
from pipeline.prompts.parts.input_rows import PROMPT, InputRows, RowsEntry, usable_rows

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM
    from pipeline.data.collate import Batch
    from pipeline.prompts.parts.shapes import DecoderShape

DEEP = "deep."  # a layer's number follows: its new rows [a, D] in files
REFUSED = "A number of prompts that changes between layers is not possible"

Fresh = Callable[[int], Tensor]  # of a layer, the new rows of all modules of each sample [B, m * a, D]


def require_depth(schedule: LayerSchedule, layers: int) -> None:
    """Raise UserError where a schedule has operations for more layers than the decoder has."""
    if len(schedule.ops) > layers:
        raise UserError(
            f"A prompt depth of {len(schedule.ops)} reaches beyond the decoder, which has {layers} layers. Set "
            f"method.depth to {layers} or less."
        )


class DeepOptions(ScheduleOptions):
    """The schedule, and where the rows start."""

    init: Literal["vocab_rows", "normal", "previous"] = Field(
        "vocab_rows",
        description="where new rows start: vocab_rows: words at the input, and in each further layer what the frozen "
        "model makes of them there; normal; previous: the previous stage's",
    )


class DeepEntry(RowsEntry):
    """Rows stand where `insertion` says, and are replaced, joined and carried in the layers."""

    attaches, follows_rows = True, True

    def __init__(self, insertion: str, schedule: LayerSchedule) -> None:
        super().__init__(insertion)
        self.schedule = schedule

    @property
    def changes_images(self) -> bool:
        return self.insertion != "after_image"  # attention is causal, so nothing before the rows depends on them

    def length(self, tensors: Mapping[str, Tensor]) -> int:
        return self.schedule.most

    def rows(self, tensors: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor] | None:
        found = super().rows(tensors, batch)
        return None if found is None else widened(*found, self.schedule)

    def attached(
        self, lmm: LMM, tensors: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        if inserted is None or not selection.numbers.numel() or not len(tensors.get(PROMPT, ())):
            return contextlib.nullcontext()

        def fresh(block: int) -> Tensor:
            return gather_sets(tensors[f"{DEEP}{block}"], selection.numbers, selection.weights)[0]

        return changed_rows(lmm, self.schedule, inserted, fresh)


class LayerRows(nn.Module):
    """The current stage's new rows [a, D] of one layer."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(rows, width, dtype=dtype))

    def forward(self, bank: Tensor | None, selection: Selection) -> Tensor:
        """Those of each sample [B, (m + 1) * a, D]: of the selected modules of the bank [t-1, a, D], then these."""
        sets, mine = with_own(bank, self.rows, selection)
        return gather_sets(sets, mine.numbers, mine.weights)[0]


class DeepRows(InputRows):
    """A prompt set [n, D] at the input, and new rows [a, D] for each further layer of a schedule.

    They start from what the frozen model makes of the set's rows in that layer (`init` vocab_rows), so the first step
    is that of the set alone; normal: deviation 0.02; previous: the previous stage's.
    """

    Options = DeepOptions
    follows_rows = True

    def __init__(
        self, lmm: LMM, schedule: LayerSchedule, insertion: str = "after_bos", init: str = "vocab_rows"
    ) -> None:
        super().__init__(lmm, schedule.ops[0].add, insertion, init)
        require_usual_layers(lmm)
        require_depth(schedule, len(lmm.decoder.layers))  # type: ignore[arg-type]
        self.schedule = schedule
        self.layers = nn.ModuleDict(
            {str(block): LayerRows(rows, lmm.width, lmm.dtype) for block, rows in schedule.adds.items() if block}
        )

    @classmethod
    def of(cls, lmm: LMM, method: Any) -> DeepRows:
        """Those of a method's options."""
        options = cls.options(method)
        init = "previous" if method.carries_prompt else options.init
        return cls(lmm, options.schedule, method.insertion, init)

    @classmethod
    def entry(cls, method: Any) -> DeepEntry:
        """How finished modules of a method enter."""
        return DeepEntry(method.insertion, cls.options(method).schedule)

    @classmethod
    def keeps(cls, name: str) -> bool:
        return name == PROMPT or name.startswith(DEEP)

    @classmethod
    def length(cls, method: Any) -> int:
        return int(cls.options(method).schedule.most)

    @classmethod
    def require_attention(cls, method: Any, implementation: str) -> None:
        if len(set(cls.options(method).schedule.present)) > 1:
            require_masks(implementation, REFUSED)

    @classmethod
    def sizes(cls, method: Any, shape: DecoderShape) -> list[int]:
        schedule = cls.options(method).schedule
        require_depth(schedule, shape.layers)
        return [rows * shape.width for rows in schedule.adds.values()]

    def trainables(self) -> dict[str, nn.Parameter]:
        fresh = {f"{DEEP}{block}": layer.get_parameter("rows") for block, layer in self.layers.items()}
        return {PROMPT: self.prompt, **fresh}

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = super().start(lmm, generator, previous)
        if self.init == "previous" and PROMPT in previous:
            return {name: previous[name].clone() for name in self.trainables()}
        if not len(self.layers):
            return values
        if self.init == "normal":
            shapes = {name: shape_of(value) for name, value in self.trainables().items() if name != PROMPT}
            return values | {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        words = usable_rows(lmm)
        more = self.schedule.most - len(values[PROMPT])  # rows that only deeper layers have
        further = lmm.vocabulary_rows(words[torch.randint(len(words), (more,), generator=generator)])
        states = hidden_states_of(lmm, torch.cat([values[PROMPT], further]))
        for block in map(int, self.layers):
            carried, present = self.schedule.of(block)
            values[f"{DEEP}{block}"] = states[block][carried:present].clone()
        return values

    def rows(self, bank: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, Tensor] | None:
        found = super().rows(bank, batch)
        return None if found is None else widened(*found, self.schedule)

    def attached(
        self, lmm: LMM, bank: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        assert inserted is not None

        def fresh(block: int) -> Tensor:
            rows: Tensor = self.layers[str(block)](bank.get(f"{DEEP}{block}"), selection)
            return rows

        return changed_rows(lmm, self.schedule, inserted, fresh)


def widened(vectors: Tensor, valid: Tensor, schedule: LayerSchedule) -> tuple[Tensor, Tensor]:
    """Sets of the first layer's length [B, m * n, D] with their validity [B, m * n], filled up to the most rows of any
    layer."""
    first, most = schedule.present[0], schedule.most
    if first == most:
        return vectors, valid
    sets = pad(vectors.unflatten(1, (-1, first)), (0, 0, 0, most - first))
    return sets.flatten(1, 2), valid.unflatten(1, (-1, first))[..., :1].expand(-1, -1, most).flatten(1, 2)


def changed_rows(lmm: LMM, schedule: LayerSchedule, inserted: Tensor, fresh: Fresh) -> AbstractContextManager[None]:
    """While the block runs, the inserted rows are those of the schedule in every layer.

    Args:
        lmm: the frozen model.
        schedule: of the layers.
        inserted: of each column of the sequences the number from 1 of the inserted row there, 0: none [B, S].
        fresh: the new rows of a layer; called once for it, when it runs over more than one token.
    """
    most = schedule.most
    number, slot = (inserted - 1) // most, torch.where(inserted > 0, (inserted - 1) % most, -1)  # whose, and which row
    places: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def placed(block: int, hidden: Tensor) -> Tensor:
        carried, present = schedule.of(block)
        queries = hidden.shape[1]
        if queries == 1 or present == carried:  # a further token of an answer: its rows were placed with the question
            return hidden
        if (carried, present, queries) not in places:
            of, which = number[:, -queries:], slot[:, -queries:]
            samples, columns = ((which >= carried) & (which < present)).nonzero(as_tuple=True)
            source = of[samples, columns] * (present - carried) + which[samples, columns] - carried
            places[carried, present, queries] = samples, columns, source
        samples, columns, source = places[carried, present, queries]
        return hidden.index_put((samples, columns), fresh(block)[samples, source].to(hidden))

    def changed(block: int) -> Change:
        present = schedule.of(block)[1]

        def change(read: LayerInputs) -> LayerInputs:
            hidden = placed(block, read.hidden) if block else read.hidden
            if present == most:
                return LayerInputs(hidden, read.mask, read.cache)
            return LayerInputs(hidden, without_keys(full_mask(read, inserted.shape[1]), slot >= present), read.cache)

        return change

    layers = len(lmm.decoder.layers)  # type: ignore[arg-type]
    changing = [block for block in range(layers) if (block and block in schedule.adds) or schedule.of(block)[1] < most]
    if any(schedule.of(block)[1] < most for block in changing):
        require_masks(attention_of(lmm), REFUSED)
    return changed_layers(lmm, {block: changed(block) for block in changing})
