"""Components that are summed to one prefix per layer, each weighted by how its key matches the sample's query (CODA).

Every task adds components; those of earlier tasks stay in the sum and do not learn. A weight is the cosine of the
query, multiplied number by number with the component's attention, to its key; it may be negative, and weights do not
add up to one. So a further task changes every prefix.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from pipeline.backbones.layer_hooks import attention_of, require_masks, require_usual_layers
from pipeline.config.base import Section
from pipeline.data.selection import Selection
from pipeline.prompts.parts.base import Entry, Part, shape_of
from pipeline.prompts.parts.prefix import REFUSED, Prefix, chosen_layers, key_value_heads, layer_of, prefixed
from pipeline.prompts.parts.prompt_pool import queries_of

if TYPE_CHECKING:
    from pipeline.backbones.decoding import Attached
    from pipeline.backbones.lmm import LMM
    from pipeline.data.collate import Batch
    from pipeline.prompts.parts.shapes import DecoderShape

BEGIN = "prefix."
KEYS, VALUES, MATCH, ATTENTION = ".component_keys", ".component_values", ".match", ".attention"
ENDS = (KEYS, VALUES, MATCH, ATTENTION)
SMALL = 1e-4  # length of what is left of a unit vector, below which no further orthogonal one is there


class ComponentOptions(Section):
    """How many components a task adds, and to which layers."""

    components: int = Field(10, ge=1, description="components that each task adds")
    component_length: int = Field(8, ge=1, description="keys and values of the prefix that they are summed to")
    layers: tuple[int, ...] | None = Field(
        None, min_length=1, description="layers with a prefix; null: the first 5/12, as 0 to 4 of 12"
    )

    def layers_of(self, count: int) -> list[int]:
        """The layers with a prefix, of a decoder with so many; UserError for others."""
        return chosen_layers(range(max(1, round(count * 5 / 12))) if self.layers is None else self.layers, count)


def matches(queries: Tensor, match: Tensor, attention: Tensor) -> Tensor:
    """The weights [B, M] of components with keys and attentions [M, 2 K] for queries [B, 2 K], in float32."""
    attended = normalize(queries[:, None] * attention.float(), dim=-1)  # [B, M, 2 K]
    return torch.einsum("bmk,mk->bm", attended, normalize(match.float(), dim=-1))


def mixed(weights: Tensor, keys: Tensor, values: Tensor) -> Prefix:
    """The prefix that components with keys and values [M, L, heads, d] are summed to with weights [B, M]."""
    found = [torch.einsum("bm,mlhd->bhld", weights.to(part), part) for part in (keys, values)]
    return Prefix(found[0], found[1], torch.ones(len(weights), keys.shape[1], dtype=torch.bool, device=keys.device))


def chosen_components(batch: Batch, weights: Sequence[Tensor]) -> Selection:
    """All components of all layers as a selection, whose weights are those of one layer [B, M] after the other."""
    found = torch.cat(list(weights), dim=1)
    return Selection(torch.arange(found.shape[1], device=found.device).expand(len(found), -1), found)


class ComponentEntry(Entry):
    """Each sample's prefix of a layer is the sum of all selected tasks' components, weighted by its query."""

    attaches = True

    def layers(self, tensors: Mapping[str, Tensor]) -> list[int]:
        """The layers with a prefix, in order."""
        names = [name for name, value in tensors.items() if name.endswith(KEYS) and len(value)]
        return sorted(layer_of(name) for name in names)

    def chosen(self, tensors: Mapping[str, Tensor], batch: Batch) -> Selection:
        layers = self.layers(tensors)
        if not layers or not batch.selected.shape[1]:
            return batch.selection
        queries, weights = queries_of(batch), []
        shares = batch.selection.full_weights()
        tasks = len(tensors[f"{BEGIN}{layers[0]}{MATCH}"])
        # [B, T]: a task that the rule did not select for a sample adds nothing to it.
        share = shares.new_zeros(len(shares), tasks).scatter_add(1, batch.selected.clamp(min=0), shares)
        for layer in layers:
            match, attention = tensors[f"{BEGIN}{layer}{MATCH}"], tensors[f"{BEGIN}{layer}{ATTENTION}"]
            found = matches(queries, match.flatten(0, 1), attention.flatten(0, 1))
            weights.append(found * share.repeat_interleave(match.shape[1], dim=1))
        return chosen_components(batch, weights)

    def attached(
        self, lmm: LMM, tensors: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        return self.on(lmm, tensors)(selection, inserted)

    def on(self, lmm: LMM, tensors: Mapping[str, Tensor]) -> Attached:
        layers = self.layers(tensors)
        last: list[tuple[Selection, dict[int, Prefix]]] = []  # most tokens are of the same rows

        def attached(selection: Selection, inserted: Tensor | None = None) -> AbstractContextManager[None]:
            if selection.weights is None or not selection.numbers.numel() or not layers:
                return contextlib.nullcontext()
            if not last or last[0][0] is not selection:
                weights = selection.weights.unflatten(1, (len(layers), -1)).unbind(1)
                pairs = [(tensors[f"{BEGIN}{n}{KEYS}"], tensors[f"{BEGIN}{n}{VALUES}"]) for n in layers]
                flat = [(keys.flatten(0, 1), values.flatten(0, 1)) for keys, values in pairs]
                made = [mixed(weight, *pair) for weight, pair in zip(weights, flat, strict=True)]
                last[:] = [(selection, dict(zip(layers, made, strict=True)))]
            return prefixed(lmm, {layer: functools.partial(last[0][1].__getitem__, layer) for layer in layers})

        return attached


class _Beside(nn.Module):
    """Two tensors of the current task's components in one layer, read with those of earlier tasks before them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(shape, dtype=dtype))
        self.second = nn.Parameter(torch.zeros(shape, dtype=dtype))

    def forward(self, earlier: tuple[Tensor | None, Tensor | None], use: Callable[[Tensor, Tensor], Any]) -> Any:
        """What `use` makes of both [t * M, ...]; `earlier` are [t-1, M, ...], which do not learn."""
        own = zip(earlier, (self.first, self.second), strict=True)
        both = [mine.clone() if old is None else torch.cat([old.flatten(0, 1), mine]) for old, mine in own]
        return use(*both)


class Components(Part):
    """The components of one task, beside those of all earlier ones; with `carried` each stage goes on from them."""

    Options = ComponentOptions
    sized_by = "component_length"

    def __init__(self, lmm: LMM, options: ComponentOptions, key_width: int, carried: bool = False) -> None:
        super().__init__()
        self.carried = carried
        require_usual_layers(lmm)
        require_masks(attention_of(lmm), REFUSED)
        heads, size = key_value_heads(lmm.model.config.get_text_config())
        layers = [str(layer) for layer in options.layers_of(len(lmm.decoder.layers))]  # type: ignore[arg-type]
        prefix = options.components, options.component_length, heads, size
        self.prefixes = nn.ModuleDict({layer: _Beside(prefix, lmm.dtype) for layer in layers})
        self.matching = nn.ModuleDict(
            {layer: _Beside((options.components, 2 * key_width), lmm.dtype) for layer in layers}
        )
        self.earlier: Mapping[str, Tensor] = {}

    @classmethod
    def keyed(cls, lmm: LMM, method: Any, key_width: int) -> Components:
        """Those of a method's options."""
        return cls(lmm, cls.options(method), key_width, method.carries_prompt)

    @classmethod
    def entry(cls, method: Any) -> Entry:
        """How finished components of a method enter."""
        return ComponentEntry()

    @classmethod
    def keeps(cls, name: str) -> bool:
        return name.startswith(BEGIN) and name.endswith(ENDS)

    @classmethod
    def require_attention(cls, method: Any, implementation: str) -> None:
        require_masks(implementation, REFUSED)

    @classmethod
    def sizes(cls, method: Any, shape: DecoderShape) -> list[int]:
        options, (heads, size) = cls.options(method), key_value_heads(shape.text)
        one = [options.components * options.component_length * heads * size] * 2
        return (one + [options.components * 2 * shape.key_width] * 2) * len(options.layers_of(shape.layers))

    def trainables(self) -> dict[str, nn.Parameter]:
        found = {}
        for layer in self.prefixes:
            pairs = ((self.prefixes[layer], (KEYS, VALUES)), (self.matching[layer], (MATCH, ATTENTION)))
            for module, (first, second) in pairs:
                found[f"{BEGIN}{layer}{first}"] = module.get_parameter("first")
                found[f"{BEGIN}{layer}{second}"] = module.get_parameter("second")
        return found

    def begin(self, bank: Mapping[str, Tensor]) -> None:
        self.earlier = bank

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Orthonormal vectors, orthogonal to those of all earlier tasks too, of each layer's prefixes (keys and values
        together), keys and attentions; where they are carried, those of the stage before."""
        if self.carried and previous:
            return {name: previous[name].clone() for name in self.trainables()}
        shapes, values = {name: shape_of(value) for name, value in self.trainables().items()}, dict[str, Tensor]()
        for layer in self.prefixes:
            names = [f"{BEGIN}{layer}{end}" for end in ENDS]
            for together in (names[:2], names[2:3], names[3:]):
                rows = [self.earlier[name].float().flatten(2) for name in together if name in self.earlier]
                old = torch.cat(rows, dim=2).flatten(0, 1).cpu() if rows else None
                widths = [int(torch.Size(shapes[name][1:]).numel()) for name in together]
                made = orthonormal(shapes[names[0]][0], sum(widths), old, generator).split(widths, dim=1)
                values |= {name: part.reshape(shapes[name]) for name, part in zip(together, made, strict=True)}
        return values

    def chosen(self, bank: Mapping[str, Tensor], batch: Batch) -> Selection:
        use = functools.partial(matches, queries_of(batch))
        return chosen_components(batch, [self.matching[n](self._beside(bank, n, MATCH), use) for n in self.matching])

    def attached(
        self, lmm: LMM, bank: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        assert selection.weights is not None
        layers = list(self.prefixes)
        weights = dict(zip(layers, selection.weights.unflatten(1, (len(layers), -1)).unbind(1), strict=True))

        def prefix(layer: str) -> Prefix:
            def use(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                found = mixed(weights[layer], keys, values)
                return found.keys, found.values, found.shown

            return Prefix(*self.prefixes[layer](self._beside(bank, layer, KEYS), use))

        return prefixed(lmm, {int(layer): functools.partial(prefix, layer) for layer in layers})

    def orthogonality(self, bank: Mapping[str, Tensor]) -> Tensor:
        """The sum over layers of the mean squared entries of X X^T - I, for keys, attentions and prefixes X."""
        found = []
        for layer in self.prefixes:
            match, attention = self.matching[layer](self._beside(bank, layer, MATCH), lambda *both: both)
            keys, values = self.prefixes[layer](self._beside(bank, layer, KEYS), lambda *both: both)
            for rows in (match, attention, torch.cat([keys.flatten(1), values.flatten(1)], dim=1)):
                gram = rows.float() @ rows.float().T
                found.append((gram - torch.eye(len(gram), device=gram.device)).square().mean())
        return torch.stack(found).sum()

    def _beside(self, bank: Mapping[str, Tensor], layer: str, end: str) -> tuple[Tensor | None, Tensor | None]:
        second = {KEYS: VALUES, MATCH: ATTENTION}[end]
        return bank.get(f"{BEGIN}{layer}{end}"), bank.get(f"{BEGIN}{layer}{second}")


def orthonormal(count: int, width: int, earlier: Tensor | None, generator: torch.Generator) -> Tensor:
    """`count` unit vectors [count, width], orthogonal to each other and to the rows of `earlier` [M, width].

    Where there are more than so many directions, the rest are unit vectors drawn at random.
    """
    basis = torch.zeros(0, width)
    for row in [] if earlier is None else earlier:
        basis = _joined(basis, row)[0]
    found = []
    for _ in range(count):
        drawn = torch.randn(width, generator=generator)
        basis, left = _joined(basis, drawn)
        found.append(normalize(drawn, dim=0) if left is None else left)
    return torch.stack(found)


def _joined(basis: Tensor, row: Tensor) -> tuple[Tensor, Tensor | None]:
    """An orthonormal basis with the direction that a row adds, and that direction; None where it adds none."""
    left = normalize(row, dim=0)
    for _ in range(2):  # once more against what rounding leaves
        left = left - basis.T @ (basis @ left)
    if float(left.norm()) < SMALL:
        return basis, None
    left = normalize(left, dim=0)
    return torch.cat([basis, left[None]]), left
