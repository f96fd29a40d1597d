"""Quantises the decoder's linear layers while transformers reads a checkpoint.

transformers calls a quantiser for every tensor when it has arrived on the device, so neither the GPU nor the host ever
holds the whole unquantised model. Only `load_weights` imports this module, where `model.quantization` asks for it: it
imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pipeline.backbones.lmm_families import family_of
from pipeline.backbones.quantised import QuantisedLinear, quantise, quantised_bytes
from pipeline.errors import UserError

METHOD = "continual-prompts"  # the name under which transformers finds these classes


@register_quantization_config(METHOD)
class DecoderQuantization(QuantizationConfigMixin):
    """What `from_pretrained` takes as `quantization_config` for a kind of quantised weights."""

    def __init__(self, kind: str) -> None:
        self.quant_method, self.kind = METHOD, kind


@register_quantizer(METHOD)
class DecoderQuantiser(HfQuantizer):
    """Replaces the decoder's linear layers before loading, and quantises their weights as they arrive."""

    is_trainable = True

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight; transformers reserves so much of a GPU's memory before it reads."""
        size: int = quantised_bytes(1024, 1024, self.quantization_config.kind)
        return size / 1024**2

    def is_serializable(self) -> bool:
        return False

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        module, _dot, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module), QuantisedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self.quantization_config.kind)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        decoder = model.model.get_submodule(family_of(model.config.model_type).decoder)
        # Subclasses may compute something else.
        layers = {name: module for name, module in decoder.named_modules() if type(module) is nn.Linear}
        if not layers:
            raise UserError(
                f"The decoder of this {model.config.model_type} has no linear layers whose weights could be "
                "quantised; set model.quantization to none."
            )
        for name, layer in layers.items():
            above, _, own = name.rpartition(".")
            bias = None if layer.bias is None else layer.bias.dtype
            made = QuantisedLinear(layer.in_features, layer.out_features, bias, self.quantization_config.kind)
            setattr(decoder.get_submodule(above), own, made)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        # From here on it is a model like any other: transformers refuses `half` and saving for what it calls quantised.
        self.remove_quantization_config(model)


class _Quantise(ConversionOps):
    """Makes weight and scales of a weight."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *_: Any, **__: Any) -> dict[str, Tensor]:
        ((name, given),) = input_dict.items()
        weight, scales = quantise(given[0] if isinstance(given, list) else given, self.kind)
        return {name: weight, f"{name.removesuffix('weight')}scales": scales}
