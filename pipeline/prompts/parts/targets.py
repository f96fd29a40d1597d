"""What the option `targets` of low-rank updates names: layers by the ends of their names, in a model or its shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from pipeline.backbones.image_layer import ImageLayer
from pipeline.config.low_rank import BEFORE_DECODER, IMAGE_LAYER, INPUT_LAYER, LowRankOptions
from pipeline.errors import UserError, nearest

if TYPE_CHECKING:
    from pipeline.backbones.lmm import LMM
    from pipeline.prompts.parts.shapes import DecoderShape, LinearShape

Layer = nn.Linear | nn.Embedding | ImageLayer


def ending_in(targets: Sequence[str], names: Iterable[str], inputs: bool = False) -> list[str]:
    """Those of the linear layers' names that end in a target; UserError for a target that names no layer.

    With `inputs` the input embeddings and the image features are among them where targets name these.
    """
    names = [*names, *BEFORE_DECODER] if inputs else list(names)
    known = sorted({name.rpartition(".")[2] for name in names})
    for target in targets:
        if target in BEFORE_DECODER and not inputs:
            raise UserError(
                f"method.targets: '{target}' is no layer of the decoder, and this method's modules are made for its "
                f"linear layers alone; expected among {', '.join(known)}, or a method on plain low-rank updates."
            )
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise UserError(
                f"method.targets: no linear layer of the decoder ends in '{target}'; expected among "
                f"{', '.join(known)}.{nearest(target, known)}"
            )
    return [name for name in names if f".{name}".endswith(tuple(f".{target}" for target in targets))]


def sides(layer: Layer) -> tuple[int, int]:
    """Widths of a layer's inputs, for the input embeddings the number of words, and of its outputs."""
    if isinstance(layer, nn.Embedding):
        return layer.num_embeddings, layer.embedding_dim
    return layer.in_features, layer.out_features


def updated_linears(targets: Sequence[str], shape: DecoderShape, inputs: bool = False) -> list[LinearShape]:
    """The layers that get an update; UserError for a target that names none.

    Without `inputs` the input embeddings and the image projector are none of them, and naming them is an error too.
    """
    linears = {linear.name: linear for linear in shape.linears}
    known = {**linears, INPUT_LAYER: shape.words, IMAGE_LAYER: shape.images}
    found = [known[name] for name in ending_in(targets, linears, inputs)]
    require_image_inputs({one.name: one.inputs for one in found})
    return found


def inputs_read(options: LowRankOptions, shape: DecoderShape) -> int:
    """Elements per token of what the updates read, which gradients need.

    Layers that read the same keep it once; with dropout each layer keeps its own, which differ. Without the output
    layer's, which are of the answers' tokens alone, and small beside its scores. Of the input embeddings' update, which
    reads token ids, A's column of the word is kept.
    """
    layers = updated_linears(options.targets, shape, inputs=True)
    columns = options.rank * any(one.is_words for one in layers)
    linears = [one for one in layers if not (one.is_output or one.is_words)]
    own = [one.inputs for one in linears] if options.dropout else dict(one.reads for one in linears).values()
    return columns + sum(own)


def output_updated(targets: Sequence[str], shape: DecoderShape) -> bool:
    """Whether the output layer is among the layers that get an update."""
    return any(linear.is_output for linear in updated_linears(targets, shape, inputs=True))


def linear_layers(lmm: LMM, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers of a model whose names end in a target; UserError for a target that no name ends in."""
    layers = lmm.linears
    return {name: layers[name] for name in ending_in(targets, layers)}


def updated_layers(lmm: LMM, targets: Sequence[str]) -> dict[str, Layer]:
    """As `linear_layers`, with the input embeddings and the image projector where a target names them."""
    layers: dict[str, Layer] = {**lmm.linears, INPUT_LAYER: lmm.input_embeddings, IMAGE_LAYER: lmm.image_layer}
    found = {name: layers[name] for name in ending_in(targets, lmm.linears, inputs=True)}
    require_image_inputs({name: sides(layer)[0] for name, layer in found.items()})
    return found


def require_image_inputs(widths: Mapping[str, int]) -> None:
    """Raise UserError where the image projector is among the layers and does not read one feature per image token."""
    if widths.get(IMAGE_LAYER) == 0:
        raise UserError(
            f"method.targets: this model's projector reads several features for an image token, so '{IMAGE_LAYER}' has "
            "no inputs of the tokens' own; expected the decoder's layers, or a model such as LLaVA-1.5."
        )
