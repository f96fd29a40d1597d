"""What the option `targets` of low-rank updates names: layers by the ends of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from pipeline.backbones.lmm import ImageLayer
from pipeline.config.low_rank import BEFORE_DECODER
from pipeline.errors import UserError, nearest

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
