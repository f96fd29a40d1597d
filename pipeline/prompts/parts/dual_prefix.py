"""Two kinds of prefixes (DualPrompt): general ones that every stage trains, and those of one task, found by its key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.dual_prefix import DualPrefixOptions
from pipeline.data.selection import NO_SET, Selection
from pipeline.prompts.parts.base import SHARED, Entry, shape_of
from pipeline.prompts.parts.prefix import (
    KEYS,
    PREFIX,
    VALUES,
    LayerPrefix,
    Prefix,
    PrefixEntry,
    Prefixes,
    PrefixRows,
    chosen_layers,
    key_value_heads,
    layer_of,
    prefixed,
)
from pipeline.prompts.parts.prompt_pool import queries_of
from pipeline.prompts.queries import LearnedKeys
from pipeline.prompts.routers.learned_key import KEY

if TYPE_CHECKING:
    from pipeline.backbones.decoding import Attached
    from pipeline.backbones.lmm import LMM
    from pipeline.data.collate import Batch
    from pipeline.prompts.parts.shapes import DecoderShape

GENERAL = f"{SHARED}{PREFIX}"
TASK_KEY = "task_key"


class DualOptions(DualPrefixOptions):
    """Those of the part, which may also go on from the stage before."""

    init: Literal["vocab_rows", "normal", "previous"] = Field(  # type: ignore[assignment]
        "vocab_rows", description="where a prefix starts: the frozen model's own keys and values of words; or normal"
    )

    def layers(self, count: int) -> tuple[list[int], list[int]]:
        """The layers with shared prefixes and those with a task's, of a decoder with so many; UserError for others."""
        first = math.ceil(count / 6)
        last = max(first + 1, round(count * 5 / 12))
        general = range(first) if self.general_layers is None else self.general_layers
        task = range(min(first, count - 1), min(last, count)) if self.task_layers is None else self.task_layers
        return (
            chosen_layers(list(general), count, "method.general_layers"),
            chosen_layers(list(task), count, "method.task_layers"),
        )


def joined(general: Prefix | None, task: Prefix | None) -> tuple[str, Prefix]:
    """Both in one layer, and what they are together."""
    if general is None or task is None:
        found = general if task is None else task
        assert found is not None
        return ("general" if task is None else "task"), found
    shown = general.shown
    if task.shown.dtype != torch.bool:  # logarithms of weights
        hidden = torch.finfo(task.shown.dtype).min
        shown = torch.zeros_like(shown, dtype=task.shown.dtype).masked_fill(~shown, hidden)
    return "both", Prefix(
        torch.cat([general.keys, task.keys], dim=2),
        torch.cat([general.values, task.values], dim=2),
        torch.cat([shown, task.shown], dim=1),
    )


def for_all(selection: Selection) -> Selection:
    """One module, the same one, for every sample of a batch that has any."""
    some = (selection.numbers != NO_SET).any(1, keepdim=True)
    return Selection(torch.where(some, 0, NO_SET))


class DualEntry(PrefixEntry):
    """A task's keys and values for the samples that select it, and before them the shared ones for every sample."""

    def on(self, lmm: LMM, tensors: Mapping[str, Tensor]) -> Attached:
        attached = super().on(lmm, tensors)
        everyone = [n for n, value in tensors.items() if n.startswith(PREFIX) and len(value)]
        # Where no module is selected for any sample there are no tensors of tasks, and the frozen model answers.
        return attached if everyone else super().on(lmm, {})

    def layers(self, tensors: Mapping[str, Tensor]) -> list[int]:
        general = [name for name in tensors if name.startswith(GENERAL) and name.endswith(KEYS)]
        return sorted({*super().layers(tensors), *(layer_of(name.removeprefix(SHARED)) for name in general)})

    def prefix(self, tensors: Mapping[str, Tensor], layer: int, selection: Selection) -> tuple[str, Prefix]:
        keys, general = tensors.get(f"{GENERAL}{layer}{KEYS}"), None
        if keys is not None:
            general = Prefix.of(keys[None], tensors[f"{GENERAL}{layer}{VALUES}"][None], for_all(selection))
        own = f"{PREFIX}{layer}{KEYS}" in tensors
        return joined(general, super().prefix(tensors, layer, selection)[1] if own else None)


class DualPrefix(PrefixRows):
    """A task's prefixes and its key, and general prefixes, which go on from the values of the stage before.

    With `freeze` the general ones are those of the first stage, bit for bit. With `carried` the task's prefixes go on
    from the stage before too.
    """

    Options = DualOptions
    sized_by = "task_length"
    learns_key = True

    def __init__(self, lmm: LMM, options: DualOptions, key_width: int, carried: bool = False) -> None:
        count = len(lmm.decoder.layers)  # type: ignore[arg-type]
        (general, own), (first, length) = options.layers(count), options.lengths
        super().__init__(lmm, length, own, options.init, carried or options.init == "previous")
        heads, size = key_value_heads(lmm.model.config.get_text_config())
        self.general = nn.ModuleDict({str(layer): LayerPrefix(first, heads, size, lmm.dtype) for layer in general})
        self.key = LearnedKeys(1, key_width, lmm.dtype)
        self.freeze, self.frozen = options.freeze_g_after_first, False

    @classmethod
    def keyed(cls, lmm: LMM, method: Any, key_width: int) -> DualPrefix:
        """That of a method's options."""
        return cls(lmm, cls.options(method), key_width, method.carries_prompt)

    @classmethod
    def entry(cls, method: Any) -> Entry:
        """How finished modules of a method enter."""
        return DualEntry()

    @classmethod
    def sizes(cls, method: Any, shape: DecoderShape) -> list[int]:
        options = cls.options(method)
        heads, size = key_value_heads(shape.text)
        pairs = zip(options.layers(shape.layers), options.lengths, strict=True)
        prefixes = [length * heads * size for layers, length in pairs for _ in range(2 * len(layers))]
        return [*prefixes, 2 * shape.key_width]

    @classmethod
    def changes_shared(cls, method: Any) -> bool:
        options = cls.options(method)
        return not options.freeze_g_after_first and options.general_layers != ()

    @classmethod
    def stored(cls, method: Any, shape: DecoderShape) -> int:
        options = cls.options(method)
        heads, size = key_value_heads(shape.text)
        return int(2 * len(options.layers(shape.layers)[1]) * options.lengths[1] * heads * size)

    def trainables(self) -> dict[str, nn.Parameter]:
        ends, layers = (KEYS, VALUES), self.general.items()
        general = {f"{GENERAL}{name}{end}": getattr(layer, end[1:]) for name, layer in layers for end in ends}
        return {**super().trainables(), **general, TASK_KEY: self.key.keys}

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.frozen = self.freeze and bool(previous)
        trainables = self.trainables()
        own = [name for name in trainables if name.startswith(PREFIX)]
        general = [name for name in trainables if name.startswith(GENERAL)]
        values = self.starting(lmm, generator, {name: shape_of(trainables[name]) for name in own})
        if self.carried and previous:
            values = {name: previous[name].clone() for name in own}
        if previous:
            values |= {name: previous[name].clone() for name in general}
        else:
            values |= self.starting(lmm, generator, {name: shape_of(trainables[name]) for name in general})
        return values | {TASK_KEY: self.key.start(generator, shape_of(trainables[TASK_KEY]))}

    def outcome(self, values: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: previous[name] for name in values if name.startswith(GENERAL)} if self.frozen else {}
        return {name: value for name, value in {**values, **kept}.items() if name != TASK_KEY}  # the router has it

    def finish(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {KEY: values[TASK_KEY][0]}

    def key_distances(self, batch: Batch) -> Tensor:
        return 1.0 - self.key(queries_of(batch))[:, 0]

    def attached(
        self, lmm: LMM, bank: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        def prefix(layer: int) -> tuple[str, Prefix]:
            general, name = None, str(layer)
            if name in self.general:
                nothing = Selection(selection.numbers[:, :0])
                keys, values, shown = self.general[name]((None, None), nothing)
                if self.frozen:  # gradients of zero: every rank has the same parameters with gradients in all stages
                    keys, values = (part.detach() + 0.0 * part for part in (keys, values))
                general = Prefix(keys, values, shown)
            return joined(general, self.task_prefix(bank, layer, selection) if name in self.layers else None)

        made = Prefixes(prefix)
        return prefixed(lmm, made.of(sorted({int(name) for name in (*self.layers, *self.general)})))
