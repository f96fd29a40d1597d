"""Prefixes: keys and values that stand before those of a sequence in chosen layers of the decoder.

They enter behind the projections to keys and values and have no rotary embedding, so they are as far from every token.
The sequence, its positions and its cache stay as they are: a layer's attention is given a cache that puts the prefix
before what it returns, and a mask with further columns, in training, for a prompt and for every further token.

One file because the cache and the mask mean nothing without the prefix that they put in.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from einops import repeat
from pydantic import Field
from torch import Tensor, nn

from pipeline.backbones.layer_hooks import (
    Change,
    LayerInputs,
    attention_of,
    changed_layers,
    full_mask,
    require_masks,
    require_usual_layers,
)
from pipeline.backbones.row_states import keys_and_values_of
from pipeline.config.base import Section
from pipeline.data.selection import NO_SET, Selection
from pipeline.errors import UserError
from pipeline.prompts.parts.base import SHARED, Entry, Part, shape_of, with_own
from pipeline.prompts.parts.input_rows import usable_rows

if TYPE_CHECKING:
    from pipeline.backbones.decoding import Attached
    from pipeline.backbones.lmm import LMM
    from pipeline.prompts.parts.shapes import DecoderShape

PREFIX = "prefix."
KEYS, VALUES = ".keys", ".values"
REFUSED = "Prefixes of keys and values are not possible"


class PrefixOptions(Section):
    """How many keys and values a module holds, and in which layers."""

    prefix_length: int = Field(10, ge=1, description="keys and values of a module in each of its layers")
    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="numbers of the decoder's layers that have them, from 0; null: all"
    )
    init: Literal["vocab_rows", "normal", "previous"] = Field(
        "vocab_rows",
        description="where they start: vocab_rows: the frozen model's own keys and values of words; normal; previous: "
        "the previous stage's",
    )


def chosen_layers(layers: Sequence[int] | None, count: int, field: str = "method.layers") -> list[int]:
    """The numbers of the chosen layers of a decoder with so many; UserError for one that it does not have."""
    chosen = list(range(count)) if layers is None else sorted(set(layers))
    beyond = [layer for layer in chosen if not 0 <= layer < count]
    if beyond:
        raise UserError(
            f"{field} names layer {beyond[0]}; the decoder has {count} layers, 0 to {count - 1}. Name some of these."
        )
    return chosen


@dataclass(frozen=True)
class Prefix:
    """The keys and values that B sequences get in one layer."""

    keys: Tensor  # [B, heads, P, d]
    values: Tensor  # [B, heads, P, d]
    # [B, P] bool: whether they are attended to; float: the logarithm of their weight in the softmax
    shown: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, selection: Selection) -> Prefix:
        """The selected ones of M modules' keys and values [M, L, heads, d]; a weight multiplies its module's
        exponentials in the softmax of the attention, so that 0 is no module and 1 the whole."""
        length, numbers = keys.shape[1], selection.numbers
        chosen = numbers.clamp(min=0)
        if selection.weights is None:
            shown = numbers != NO_SET
        else:
            weights = selection.full_weights().to(keys)
            shown = weights.clamp(min=0).log().clamp(min=torch.finfo(keys.dtype).min)
        picked = [bank[chosen].flatten(1, 2).transpose(1, 2) for bank in (keys, values)]  # [B, heads, m * L, d]
        return cls(picked[0], picked[1], repeat(shown, "b m -> b (m l)", l=length))


class _PrefixedCache:
    """A layer's cache, or none, that returns a prefix before what is in it; the prefix is not stored."""

    def __init__(self, prefix: Prefix, inner: Any) -> None:
        self._prefix, self._inner = prefix, inner

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, P + M, d]: the prefix's, then all of the sequence's."""
        if self._inner is not None:
            keys, values = self._inner.update(keys, values, *args, **kwargs)
        prefix = self._prefix
        return torch.cat([prefix.keys.to(keys), keys], dim=2), torch.cat([prefix.values.to(values), values], dim=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def prefixed(lmm: LMM, prefixes: Mapping[int, Callable[[], Prefix]]) -> AbstractContextManager[None]:
    """While the block runs, these layers of the decoder attend to prefixes, which are asked for when a layer runs."""
    require_masks(attention_of(lmm), REFUSED)
    made: list[tuple[Tensor | None, Tensor, Tensor]] = []  # the last mask with its prefix: layers share them

    def change(number: int, read: LayerInputs) -> LayerInputs:
        prefix = prefixes[number]()
        if not made or made[0][0] is not read.mask or made[0][1] is not prefix.shown:
            made[:] = [(read.mask, prefix.shown, _widened(read, prefix.shown, number))]
        return LayerInputs(read.hidden, made[0][2], _PrefixedCache(prefix, read.cache))

    changes: dict[int, Change] = {number: functools.partial(change, number) for number in prefixes}
    return changed_layers(lmm, changes)


def _widened(read: LayerInputs, shown: Tensor, number: int) -> Tensor:
    """The layer's mask [B, 1, n, P + M] with the columns of a prefix before the others."""
    queries = read.hidden.shape[1]
    past = 0 if read.cache is None else int(read.cache.get_seq_length(number))
    mask = full_mask(read, past + queries) if read.mask is None else read.mask
    if mask.dtype == torch.bool and shown.dtype != torch.bool:
        mask = torch.zeros_like(mask, dtype=shown.dtype).masked_fill(~mask, torch.finfo(shown.dtype).min)
    elif mask.dtype != torch.bool and shown.dtype == torch.bool:
        shown = torch.zeros_like(shown, dtype=mask.dtype).masked_fill(~shown, torch.finfo(mask.dtype).min)
    before = shown[:, None, None].to(mask.dtype).expand(-1, 1, queries, -1)
    return torch.cat([before, mask.expand(len(shown), 1, queries, -1)], dim=3)


class PrefixEntry(Entry):
    """Keys and values stand before those of the layers that the tensors name, each row of the batch with its own."""

    attaches = True

    def attached(
        self, lmm: LMM, tensors: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        return self.on(lmm, tensors)(selection, inserted)

    def on(self, lmm: LMM, tensors: Mapping[str, Tensor]) -> Attached:
        layers, last = self.layers(tensors), list[tuple[Selection, Prefixes]]()  # most tokens are of the same rows

        def attached(selection: Selection, inserted: Tensor | None = None) -> AbstractContextManager[None]:
            if not selection.numbers.numel() or not layers:
                return contextlib.nullcontext()
            if not last or last[0][0] is not selection:
                made = Prefixes(lambda layer: self.prefix(tensors, layer, selection))
                last[:] = [(selection, made)]
            return prefixed(lmm, last[0][1].of(layers))

        return attached

    def layers(self, tensors: Mapping[str, Tensor]) -> list[int]:
        """The layers in which samples may get something."""
        names = [name for name, value in tensors.items() if name.startswith(PREFIX) and name.endswith(KEYS)]
        return [layer_of(name) for name in names if len(tensors[name])]

    def prefix(self, tensors: Mapping[str, Tensor], layer: int, selection: Selection) -> tuple[str, Prefix]:
        """What the samples get in a layer, and what layers have in common whose `shown` are equal."""
        return "task", Prefix.of(tensors[f"{PREFIX}{layer}{KEYS}"], tensors[f"{PREFIX}{layer}{VALUES}"], selection)


class Prefixes:
    """The prefixes of a batch's layers, made when a layer first asks for its own.

    Layers with equal `shown` get one object: by that they know that their masks are the same.
    """

    def __init__(self, make: Callable[[int], tuple[str, Prefix]]) -> None:
        self._make, self._made, self._shown = make, dict[int, Prefix](), dict[str, Tensor]()

    def of(self, layers: Sequence[int]) -> dict[int, Callable[[], Prefix]]:
        """By layer, what gives its prefix."""
        return {layer: functools.partial(self._prefix, layer) for layer in layers}

    def _prefix(self, layer: int) -> Prefix:
        if layer not in self._made:
            kind, found = self._make(layer)
            self._made[layer] = replace(found, shown=self._shown.setdefault(kind, found.shown))
        return self._made[layer]


def layer_of(name: str) -> int:
    """The number of the layer in the name of a tensor, `prefix.NUMBER.keys`."""
    return int(name.removeprefix(PREFIX).partition(".")[0])


class LayerPrefix(nn.Module):
    """The current stage's keys and values [L, heads, d] of one layer."""

    def __init__(self, length: int, heads: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(length, heads, size, dtype=dtype))
        self.values = nn.Parameter(torch.zeros(length, heads, size, dtype=dtype))

    def forward(self, bank: tuple[Tensor | None, Tensor | None], selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
        """Of each sample the selected earlier modules' of the `bank` and these: a `Prefix` as a tuple, for ZeRO-3
        looks for tensors in it."""
        (keys, mine), (values, _) = with_own(bank[0], self.keys, selection), with_own(bank[1], self.values, selection)
        found = Prefix.of(keys, values, mine)
        return found.keys, found.values, found.shown


class PrefixRows(Part):
    """Keys and values of one task in chosen layers of the decoder."""

    Options: ClassVar[type[Section]] = PrefixOptions
    prefix = PREFIX
    sized_by = "prefix_length"

    def __init__(
        self,
        lmm: LMM,
        length: int,
        layers: Sequence[int] | None = None,
        init: str = "vocab_rows",
        carried: bool = False,
    ) -> None:
        super().__init__()
        require_usual_layers(lmm)
        require_masks(attention_of(lmm), REFUSED)
        self.init, self.carried = init, carried
        heads, size = key_value_heads(lmm.model.config.get_text_config())
        count = len(lmm.decoder.layers)  # type: ignore[arg-type]
        made = {str(layer): LayerPrefix(length, heads, size, lmm.dtype) for layer in chosen_layers(layers, count)}
        self.layers = nn.ModuleDict(made)

    @classmethod
    def of(cls, lmm: LMM, method: Any) -> PrefixRows:
        """That of a method's options."""
        options = cls.options(method)
        carried = method.carries_prompt or options.init == "previous"
        return cls(lmm, options.prefix_length, options.layers, options.init, carried)

    @classmethod
    def entry(cls, method: Any) -> Entry:
        """How finished modules of a method enter."""
        return PrefixEntry()

    @classmethod
    def keeps(cls, name: str) -> bool:
        return name.startswith(PREFIX) and name.endswith((KEYS, VALUES))

    @classmethod
    def require_attention(cls, method: Any, implementation: str) -> None:
        require_masks(implementation, REFUSED)

    @classmethod
    def sizes(cls, method: Any, shape: DecoderShape) -> list[int]:
        options = cls.options(method)
        heads, size = key_value_heads(shape.text)
        layers = chosen_layers(options.layers, shape.layers)
        return [options.prefix_length * heads * size] * (2 * len(layers))

    def trainables(self) -> dict[str, nn.Parameter]:
        pairs = [(name, layer) for name, layer in self.layers.items() if isinstance(layer, LayerPrefix)]
        return {PREFIX + name + end: getattr(layer, end[1:]) for name, layer in pairs for end in (KEYS, VALUES)}

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The frozen model's own keys and values of words picked at random, as if these stood before every sequence."""
        trainables = self.trainables()
        if self.carried and previous:
            return {name: previous[name].clone() for name in trainables}
        return self.starting(lmm, generator, {name: shape_of(value) for name, value in trainables.items()})

    def starting(
        self, lmm: LMM, generator: torch.Generator, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Tensor]:
        """Keys and values of these shapes [L, heads, d], of the same words in all layers, by name."""
        if not shapes:
            return {}
        if self.init == "normal":
            return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        words, length = usable_rows(lmm), next(iter(shapes.values()))[0]
        rows = lmm.vocabulary_rows(words[torch.randint(len(words), (length,), generator=generator)])
        states = keys_and_values_of(lmm, rows)
        layers = {name: layer_of(name.removeprefix(SHARED)) for name in shapes}
        return {name: states[layer][name.endswith(VALUES)].clone() for name, layer in layers.items()}

    def attached(
        self, lmm: LMM, bank: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        made = Prefixes(lambda layer: ("task", self.task_prefix(bank, layer, selection)))
        return prefixed(lmm, made.of([int(name) for name in self.layers]))

    def task_prefix(self, bank: Mapping[str, Tensor], layer: int, selection: Selection) -> Prefix:
        """The selected earlier modules' keys and values of a layer, then the current one's."""
        earlier = bank.get(f"{PREFIX}{layer}{KEYS}"), bank.get(f"{PREFIX}{layer}{VALUES}")
        return Prefix(*self.layers[str(layer)](earlier, selection))


def key_value_heads(text: Any) -> tuple[int, int]:
    """Number and width of a layer's key and value heads, from the configuration of the language model."""
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads), int(size)
