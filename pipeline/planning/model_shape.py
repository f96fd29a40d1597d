"""Sizes of a model from its configuration: it is built on the meta device, so no weight is read or allocated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.backbones.attentions import takes_lengths
from pipeline.backbones.image_layer import projector_input
from pipeline.backbones.lmm import DTYPES, linears_of
from pipeline.backbones.lmm_families import family_of
from pipeline.backbones.lmm_processor import source_of
from pipeline.backbones.quantised import quantised_bytes
from pipeline.backbones.shortcuts import why_not_gated
from pipeline.config.models import ModelConfig
from pipeline.hub.snapshots import settings_folder
from pipeline.prompts.parts.shapes import DecoderShape, LinearShape


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model for the memory plan, in elements."""

    frozen: list[int]  # of each parameter
    projector: list[int]  # of each parameter of the image projector, where it is trained
    buffers: int  # bytes
    fetched: list[int]  # units that ZeRO-3 gathers at once, in the order of the modules
    text: Any
    vision: Any
    gates_kept_once: bool = False  # see `pipeline.backbones.gated`
    linears: tuple[LinearShape, ...] = ()  # of the decoder, and the output layer
    image_width: int = 0  # see `DecoderShape`

    @property
    def decoder(self) -> DecoderShape:
        """What parts are told of the decoder."""
        return DecoderShape(self.text, self.linears, self.image_width)


@dataclass(frozen=True)
class Quantised:
    """The quantised weights of a model: their number, their bytes with scales, and the number in the largest."""

    values: int = 0
    held: int = 0
    largest: int = 0

    @classmethod
    def of(cls, shape: ModelShape, kind: str) -> Quantised:
        """Those that `pipeline.backbones.quantised_loading` makes for this `model.quantization`."""
        sizes = [(one.inputs, one.outputs) for one in shape.linears if not one.is_output]
        if kind == "none" or not sizes:
            return cls()
        values = [inputs * outputs for inputs, outputs in sizes]
        return cls(sum(values), sum(quantised_bytes(*size, kind) for size in sizes), max(values))


def meta_model(model: ModelConfig, config: Any = None) -> nn.Module:
    """Build a frozen model on the meta device from its configuration, or from a given one.

    Raises UserError, OSError or ValueError when the configuration is unavailable or not of an image-text-to-text model.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    if config is None:
        config = AutoConfig.from_pretrained(settings_folder(source_of(model)), trust_remote_code=False)
    family, attention = family_of(config.model_type), model.attn_implementation
    # transformers looks for the package of a kernel, which the machine that plans may not have.
    known = "sdpa" if takes_lengths(attention) else attention
    with torch.device("meta"):
        built: nn.Module = AutoModelForImageTextToText.from_config(
            config, dtype=DTYPES[model.dtype], attn_implementation=family.attention(known), trust_remote_code=False
        )
    if known != attention:
        decoder: Any = built.model.get_submodule(family.decoder)  # type: ignore[union-attr]
        built.config._attn_implementation = family.attention(attention)  # type: ignore[union-attr]
        decoder.config._attn_implementation = attention
    return built


def model_shape(model: nn.Module, projector_learns: bool = False) -> ModelShape:
    """Count a model's parameters, each once, and the units in which ZeRO-3 gathers them."""
    config: Any = model.config
    inner: Any = model.model
    family = family_of(config.model_type)
    projector = list(inner.get_submodule(family.projector).parameters()) if projector_learns else []
    learned = {id(parameter) for parameter in projector}
    return ModelShape(
        frozen=[p.numel() for p in model.parameters() if id(p) not in learned],
        projector=[p.numel() for p in projector],
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        fetched=list(_fetched_together(model)),
        text=config.get_text_config(),
        vision=getattr(config, "vision_config", None),
        gates_kept_once=not why_not_gated(inner.get_submodule(family.decoder).layers[0].mlp, family.gated_mlps),
        image_width=projector_input(model, family),
        linears=tuple(
            LinearShape(name, module.in_features, module.out_features)
            for name, module in linears_of(model, inner.get_submodule(family.decoder)).items()
        ),
    )


def _fetched_together(module: nn.Module, layers: frozenset[str] | None = None) -> Iterator[int]:
    """Sizes of the units that ZeRO-3 gathers at once: a whole layer (see the engine), or a module's own parameters."""
    if layers is None:
        layers = frozenset(name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ())
    whole = type(module).__name__ in layers
    size = sum(parameter.numel() for parameter in module.parameters(recurse=whole))
    if size:
        yield size
    if not whole:
        for child in module.children():
            yield from _fetched_together(child, layers)


def head_size(text: Any) -> int:
    """Width of one attention head."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def key_value_width(text: Any) -> int:
    """Width of a layer's cached keys, and of its values."""
    return (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_size(text)


def intermediate_size(text: Any) -> int:
    """Width inside the MLP."""
    return getattr(text, "intermediate_size", None) or 4 * text.hidden_size


def number_in(config: Any, *names: str) -> int:
    """The first of these fields that is set, as a number; the larger one where it is (height, width)."""
    for name in names:
        value = getattr(config, name, None)
        if value:
            return int(max(value)) if isinstance(value, list | tuple) else int(value)
    return 0
