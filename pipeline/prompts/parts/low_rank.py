"""Low-rank updates of linear layers of the decoder: y = W x + (alpha / rank) * sum_i w_i B_i A_i x, W frozen.

The input embeddings are a linear layer of one-hot vectors x: A_i x is a column of A_i. The image projector, which
need not be linear, is taken for one layer W.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from pipeline.backbones.image_layer import ImageLayer
from pipeline.config.low_rank import BEFORE_DECODER, INPUT_LAYER, OUTPUT_LAYER, LowRankOptions
from pipeline.data.selection import Selection
from pipeline.prompts.parts.base import Entry, Part, shape_of
from pipeline.prompts.parts.dropout import Dropout
from pipeline.prompts.parts.mixture import Mixture, are_words
from pipeline.prompts.parts.targets import Layer, inputs_read, output_updated, sides, updated_layers, updated_linears

if TYPE_CHECKING:
    from pipeline.backbones.decoding import Attached
    from pipeline.backbones.lmm import LMM
    from pipeline.prompts.parts.shapes import DecoderShape

PREFIX = "low_rank."
A, B = ".a", ".b"
# What is added to a layer's output [B, N, outputs], of its input [B, N, inputs], or of token ids [B, N].
Update = Callable[[Tensor], Tensor]


class LowRankEntry(Entry):
    """Updates are added to the outputs of the layers that the tensors name, each row of the batch with its own."""

    attaches = True
    prefix = PREFIX

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def attached(
        self, lmm: LMM, tensors: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        return self.on(lmm, tensors)(selection, inserted)

    def on(self, lmm: LMM, tensors: Mapping[str, Tensor]) -> Attached:
        names = self.layers(tensors)
        layers = [lmm.layer(name) for name in names]
        made: list[tuple[Selection, list[Update]]] = []  # the last selection: most tokens are of the same rows

        def attached(selection: Selection, inserted: Tensor | None = None) -> AbstractContextManager[None]:
            if not made or made[0][0] is not selection:
                made[:] = [(selection, self.updates(names, tensors, selection))]
            return added_to_outputs(zip(layers, made[0][1], strict=False))

        return attached

    def updates_inputs(self, tensors: Mapping[str, Tensor]) -> bool:
        return any(self.prefix + name + A in tensors for name in BEFORE_DECODER)

    def layers(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The names of the layers that the modules update."""
        ends = [name for name in tensors if name.startswith(self.prefix) and name.endswith(A)]
        return [name.removeprefix(self.prefix).removesuffix(A) for name in ends]

    def updates(self, names: Sequence[str], tensors: Mapping[str, Tensor], selection: Selection) -> list[Update]:
        """What is added to each of these layers for a batch with this selection; [] for nothing."""
        count = max((len(value) for name, value in tensors.items() if name.startswith(self.prefix)), default=0)
        mixture = Mixture.of(selection, count)
        if mixture is None:  # the rule chose no module for any sample
            return []
        return [functools.partial(self.output, mixture, tensors, name) for name in names]

    def output(self, mixture: Mixture, tensors: Mapping[str, Tensor], name: str, inputs: Tensor) -> Tensor:
        """What the mixture adds to a layer [B, N, outputs]."""
        a, b = tensors[self.prefix + name + A], tensors[self.prefix + name + B]
        return mixture.added(inputs, a, b, name) * self.scale


class LinearUpdate(nn.Module):
    """The current stage's update of one layer: A [r, inputs] and B [outputs, r]."""

    def __init__(self, inputs: int, outputs: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(rank, inputs, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype))

    def forward(self, inputs: Tensor | None, of: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """What it adds to the output [B, N, outputs], unscaled, of inputs [B, N, inputs] or token ids [B, N]; or
        instead what a term makes `of` its A and B, which ZeRO-3 has gathered only here."""
        if of is not None:
            return of(self.a, self.b)
        assert inputs is not None
        hidden = embedding(inputs, self.a.T) if are_words(inputs) else inputs @ self.a.T
        return hidden @ self.b.T


class LinearUpdates(Part):
    """What parts have in common that update linear layers: of the decoder, and the output layer where it is named."""

    layers: Mapping[str, Layer]  # the updated layers by their names

    @classmethod
    def read(cls, method: Any, shape: DecoderShape) -> int:
        return inputs_read(cls.options(method), shape)

    @classmethod
    def adds_to_logits(cls, method: Any, shape: DecoderShape) -> bool:
        return output_updated(cls.options(method).targets, shape)

    @property
    def updates_output(self) -> bool:
        return OUTPUT_LAYER in self.layers


class LowRank(LinearUpdates):
    """A LoRA (arXiv 2106.09685) on the linear layers of `LMM.linears` whose names end in one of the `targets`, on the
    input embeddings where `embed_tokens` is among these, and on the image projector where `image_projector` is.

    The frozen layers' own weights are not touched: ZeRO-3 has them partitioned, and a hook adds to their outputs. With
    `carried` a stage goes on from the values of the one before. Earlier modules that act beside it are not trained, and
    read everything whatever the `dropout`, and so does the update of the input embeddings.
    """

    Options = LowRankOptions
    prefix = PREFIX
    sized_by, keeps_ratio = "rank", ("alpha",)  # so an update counts as much at every rank

    def __init__(
        self,
        lmm: LMM,
        targets: Sequence[str],
        rank: int,
        alpha: float,
        carried: bool = False,
        dropout: float = 0.0,
        rank_of: Callable[[str], int] | None = None,
    ) -> None:
        """A part with an update of each target.

        Args:
            lmm: the frozen model.
            targets: which layers are updated, see `LowRankOptions`.
            rank: of the updates.
            alpha: an update counts alpha / rank times.
            carried: whether a stage starts from the module of the one before.
            dropout: see `LowRankOptions`.
            rank_of: the rank by the layer's name, where some have another; `rank` still decides how much they count.
        """
        super().__init__()
        self.earlier, self.carried, self.dropout = LowRankEntry(alpha / rank), carried, Dropout(dropout)
        self.layers = updated_layers(lmm, targets)
        ranks = [rank if rank_of is None else rank_of(name) for name in self.layers]
        self.updates = nn.ModuleList(
            LinearUpdate(*sides(layer), own, lmm.dtype) for layer, own in zip(self.layers.values(), ranks, strict=True)
        )
        self._made: tuple[Any, Any, list[Update]] | None = None  # of the last batch, whose layers may be recomputed

    @classmethod
    def of(cls, lmm: LMM, method: Any) -> LowRank:
        """That of a method's options."""
        options = cls.options(method)
        return cls(
            lmm,
            options.targets,
            options.rank,
            options.alpha,
            method.carries_prompt,
            options.dropout,
            options.rank_of,
        )

    @classmethod
    def entry(cls, method: Any) -> Entry:
        """How finished modules of a method enter."""
        return LowRankEntry(cls.options(method).scale)

    @classmethod
    def sizes(cls, method: Any, shape: DecoderShape) -> list[int]:
        options = cls.options(method)
        linears = updated_linears(options.targets, shape, inputs=True)
        return [options.rank_of(one.name) * size for one in linears for size in (one.inputs, one.outputs)]

    @property
    def updates_inputs(self) -> bool:
        return any(name in self.layers for name in BEFORE_DECODER)

    def trainables(self) -> dict[str, nn.Parameter]:
        pairs = zip(self.layers, self.updates, strict=True)
        return {PREFIX + name + end: getattr(update, end[1:]) for name, update in pairs for end in (A, B)}

    def start(self, lmm: LMM, generator: torch.Generator, previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A uniform within 1 / sqrt(inputs) and B zero, as PEFT starts them: the first step is the frozen model's.

        Of the input embeddings A is zero and B standard normal, as in PEFT: a step moves the columns of those words
        alone that it has read.
        """
        values = {}
        for name, parameter in self.trainables().items():
            shape = shape_of(parameter)
            if name.startswith(PREFIX + INPUT_LAYER):
                values[name] = torch.zeros(shape) if name.endswith(A) else torch.randn(shape, generator=generator)
                continue
            uniform = (torch.rand(shape, generator=generator) * 2 - 1) * shape[1] ** -0.5
            values[name] = uniform if name.endswith(A) else torch.zeros(shape)
        self.dropout.begin(generator)
        return {name: previous[name].clone() for name in values} if self.carried and previous else values

    def attached(
        self, lmm: LMM, bank: Mapping[str, Tensor], selection: Selection, inserted: Tensor | None = None
    ) -> AbstractContextManager[None]:
        scale, beside = self.earlier.scale, self._beside(bank, selection)
        befores: list[Update | None] = [*beside] or [None] * len(self.layers)

        def update(number: int, module: nn.Module, before: Update | None, inputs: Tensor) -> Tensor:
            read = inputs if are_words(inputs) else self.dropout(inputs, selection.places, number)
            output: Tensor = module(read) * scale
            return output if before is None else output + before(inputs)

        pairs = enumerate(zip(self.updates, befores, strict=True))
        both = [functools.partial(update, number, *pair) for number, pair in pairs]
        return added_to_outputs(zip(self.layers.values(), both, strict=True))

    def summed(self, of: Callable[[str, Tensor], Tensor]) -> Tensor:
        """The sum over the trainables, by name, of what a term makes `of` them."""
        return torch.stack(
            [
                module(None, of=lambda a, b, name=name: of(PREFIX + name + A, a) + of(PREFIX + name + B, b))
                for name, module in zip(self.layers, self.updates, strict=True)
            ]
        ).sum()

    def _beside(self, bank: Mapping[str, Tensor], selection: Selection) -> list[Update]:
        """What the selected earlier modules add to each layer; [] for nothing."""
        if self._made is None or self._made[0] is not bank or self._made[1] is not selection:
            self._made = bank, selection, self.earlier.updates(list(self.layers), bank, selection) if bank else []
        return self._made[2]


@contextlib.contextmanager
def added_to_outputs(updates: Iterable[tuple[nn.Module, Update]]) -> Iterator[None]:
    """While the block runs, add to the outputs of these layers what their updates make of the inputs.

    Gemma's input embeddings multiply their rows (`embed_scale`); an update is multiplied too, as one of the rows.
    """

    def hook(layer: nn.Module, update: Update) -> Callable[..., Tensor]:
        times = getattr(layer, "embed_scale", None)
        if times is None:
            return lambda _, inputs, output: output + update(inputs[0])
        return lambda _, inputs, output: output + update(inputs[0]) * torch.as_tensor(times).to(output)

    with contextlib.ExitStack() as attached:
        for layer, update in updates:
            if isinstance(layer, ImageLayer):
                attached.enter_context(layer.updated(update))
            else:
                attached.callback(layer.register_forward_hook(hook(layer, update)).remove)
        yield


def low_rank_output(inputs: Tensor, a: Tensor, b: Tensor, selection: Selection) -> Tensor:
    """sum_i w_i B_i A_i x [B, N, outputs] of inputs [B, N, D] or token ids [B, N], `a` [M, r, D] and `b` [M, outputs,
    r]."""
    mixture = Mixture.of(selection, len(a))
    return b.new_zeros(*inputs.shape[:2], b.shape[1]) if mixture is None else mixture.added(inputs, a, b)
