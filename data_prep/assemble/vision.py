"""Vision towers as transformers' models: a published EfficientNet-Lite, or a checkpoint that transformers saved.

EfficientNet-Lite (github.com/tensorflow/tpu, models/official/efficientnet/lite) is EfficientNet with ReLU6 and without
squeeze-and-excite. transformers' EfficientNet always has squeeze-and-excite; its gate is 1 exactly where the last
layer's weights are 0 and its bias is large, so the function is that of the published network.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.hub.pickled import read_pickled

OPEN = 30.0  # bias of a gate's last layer: sigmoid(30) is 1 in float32, and in float16 and bfloat16
LITE_PATCH = 32  # an image's pixels per feature
LITE_CLASSES = 1000

# Vision transformers whose hidden states LLaVA reads with a class token in front.
VISION_TRANSFORMERS = ("clip_vision_model",)

_STEM = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


@dataclass(frozen=True)
class Tower:
    """A vision tower: `model` gives `last_hidden_state`, one feature of `width` per `patch` pixels squared."""

    model: Any
    width: int
    patch: int
    convolutional: bool  # features [n, width, rows, columns] and no class token


@dataclass(frozen=True)
class Classifier:
    """A network's own classifier of its mean feature: `weight` [classes, width], `bias` [classes]."""

    weight: Tensor
    bias: Tensor

    def probabilities(self, features: Tensor) -> Tensor:
        """Probabilities [..., classes] of features [..., width]."""
        return (features @ self.weight.T + self.bias).softmax(-1)


def efficientnet_lite(path: Path, image_size: int) -> tuple[Tower, Classifier]:
    """EfficientNet-Lite0 in the layout of efficientnet_lite_pytorch, with its ImageNet classifier.

    Only images whose side is a multiple of 32 are padded alike by both implementations. Raises UserError for other
    sizes and where the tensors are not those of Lite0.
    """
    from transformers import EfficientNetConfig, EfficientNetModel

    if image_size % LITE_PATCH:
        raise UserError(f"image_size is {image_size}; expected a multiple of {LITE_PATCH} for an EfficientNet-Lite.")
    config = EfficientNetConfig(
        **tower_facts(1280),
        image_size=image_size,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=1280,
        hidden_act="relu6",
        batch_norm_eps=1e-3,
    )
    published = read_pickled(path)
    head = Classifier(*(published.pop(name, torch.zeros(0)) for name in ("_fc.weight", "_fc.bias")))
    model = EfficientNetModel(config)
    state = lite_state(published)
    for name, value in model.state_dict().items():
        if ".squeeze_excite." in name:
            state[name] = torch.full_like(value, OPEN if name.endswith(".expand.bias") else 0.0)
    load_exactly(model, state, path, "EfficientNet-Lite0")
    if head.weight.shape != (LITE_CLASSES, config.hidden_dim):
        raise UserError(f"{path} has no classifier of {LITE_CLASSES} classes; expected EfficientNet-Lite0.")
    return Tower(model.eval().requires_grad_(False), config.hidden_dim, LITE_PATCH, True), head


def tower_facts(width: int) -> dict[str, int]:
    """What transformers' EfficientNet lacks in its configuration, and what a model around it and its processor read."""
    return {"hidden_size": width, "patch_size": LITE_PATCH}


def load_tower(layout: str, path: Path, image_size: int) -> Tower:
    """A vision tower by the layout of its weights: see `efficientnet_lite`, or a checkpoint that transformers saved.

    Of a CLIP or SigLIP checkpoint the vision tower is taken. Raises UserError where it cannot be loaded.
    """
    if layout == "efficientnet_lite":
        return efficientnet_lite(path, image_size)[0]
    from transformers import AutoModel

    try:
        model, report = AutoModel.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"The vision tower {path} cannot be loaded: {(str(error).splitlines() or [''])[0]}") from error
    if report["missing_keys"]:
        raise UserError(f"The vision tower {path} lacks tensors, for example {min(report['missing_keys'])}.")
    return tower_of(model, path, image_size)


def tower_of(model: Any, path: Path, image_size: int) -> Tower:
    """The vision tower of a model; UserError where its kind cannot be joined or its image size is another."""
    settings = getattr(model.config, "vision_config", model.config)
    part = model if settings is model.config else _loaded_alone(model.vision_model, settings)
    if settings.model_type == "efficientnet":
        if image_size % LITE_PATCH:
            raise UserError(f"vision.image_size is {image_size}; expected a multiple of {LITE_PATCH} for {path}.")
        for name, value in tower_facts(int(settings.hidden_dim)).items():
            setattr(settings, name, value)
        return Tower(part.eval().requires_grad_(False), int(settings.hidden_dim), LITE_PATCH, True)
    if settings.model_type not in VISION_TRANSFORMERS:
        raise UserError(
            f"The vision tower {path} is of type '{settings.model_type}'; expected efficientnet, "
            f"{', '.join(VISION_TRANSFORMERS)}, or a CLIP with one of them."
        )
    if settings.image_size != image_size:
        raise UserError(f"vision.image_size is {image_size}, and {path} takes images of {settings.image_size} pixels.")
    return Tower(part.eval().requires_grad_(False), int(settings.hidden_size), int(settings.patch_size), False)


def _loaded_alone(vision: nn.Module, settings: Any) -> Any:
    from transformers import AutoModel

    alone = AutoModel.from_config(settings)
    # A tower's own class may hold it as `vision_model`, depending on the version of transformers.
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in alone.state_dict()) else ""
    alone.load_state_dict({prefix + name: value for name, value in vision.state_dict().items()})
    return alone


def lite_state(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of efficientnet_lite_pytorch by their names in transformers' EfficientNet; unknown names are kept."""
    state = {}
    for name, value in published.items():
        parts = name.split(".")
        if parts[0] == "_blocks" and len(parts) == 4 and parts[2] in _BLOCK:
            name = f"encoder.blocks.{parts[1]}.{_BLOCK[parts[2]]}.{parts[3]}"
        elif parts[0] in _STEM:
            name = ".".join([_STEM[parts[0]], *parts[1:]])
        state[name] = value
    return state


def load_exactly(model: nn.Module, state: dict[str, Tensor], path: Path, wanted: str) -> None:
    """Load a state into a model; UserError where names or shapes differ from the model's."""
    own = model.state_dict()
    wrong = sorted(
        own.keys() ^ state.keys() | {name for name in own.keys() & state.keys() if own[name].shape != state[name].shape}
    )
    if wrong:
        raise UserError(
            f"{path} is no {wanted}: {len(wrong)} tensors differ in name or shape, for example {wrong[0]}. Give the "
            "file that the recipe names."
        )
    model.load_state_dict(state)
