"""The frozen CLIP or SigLIP that prompts are learned for, from any Hugging Face checkpoint of the two."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from pipeline.backbones.clip import projected
from pipeline.clip.towers.inject import image_prompts, text_prompts
from pipeline.clip.towers.schedule import PromptSchedule
from pipeline.clip.towers.text import Words
from pipeline.errors import UserError, nearest
from pipeline.hub.snapshots import Source, checkpoint

SUPPORTED = ("clip", "siglip")


@dataclass(frozen=True)
class Sizes:
    """What prompts have to fit: blocks and width of each tower, and the width of the joint space."""

    text_blocks: int
    text_width: int
    vision_blocks: int
    vision_width: int
    joint: int

    @property
    def blocks(self) -> tuple[int, int]:
        return self.text_blocks, self.vision_blocks

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """The sizes in a Hugging Face configuration; UserError for another kind of model."""
        if config.model_type not in SUPPORTED:
            raise UserError(
                f"The backbone is a model of type '{config.model_type}'; supported: {', '.join(SUPPORTED)}."
                f"{nearest(config.model_type, SUPPORTED)} Set model.path to a CLIP or SigLIP in Hugging Face format."
            )
        text, vision = config.text_config, config.vision_config
        joint = config.projection_dim if config.model_type == "clip" else vision.hidden_size
        return cls(text.num_hidden_layers, text.hidden_size, vision.num_hidden_layers, vision.hidden_size, joint)


class Backbone(nn.Module):
    """A frozen `CLIPModel` or `SiglipModel` in eval mode; prompts enter from outside, its code stays as it is.

    Only whole towers are called, never bare weights, so that ZeRO-3 can gather what is needed.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.sizes = Sizes.of(model.config)
        self.kind: str = model.config.model_type
        self.model = model
        self.requires_grad_(False)
        self.eval()
        # Constants of the frozen model, kept as buffers: the parameters themselves are sharded under ZeRO-3.
        self.register_buffer("scale", model.logit_scale.detach().float().exp().reshape(()), persistent=False)
        bias = getattr(model, "logit_bias", torch.zeros((), device=model.logit_scale.device))
        self.register_buffer("bias", bias.detach().float().reshape(()).clone(), persistent=False)

    def train(self, mode: bool = True) -> Backbone:
        """Stays in eval mode: a frozen model is the same function in training and at inference."""
        return super().train(False)

    @property
    def causal(self) -> bool:
        """Whether a text token sees only the ones before it; then texts may end at their last token."""
        return self.kind == "clip"

    def words(self, tokenizer: Any, shorten: bool | None = None) -> Words:
        """The tokenizer as the text tower needs it; texts are shortened where that is exact, or as `shorten` says."""
        length = self.model.config.text_config.max_position_embeddings
        return Words(tokenizer, length, self.causal if shorten is None else shorten and self.causal)

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Rows of the token embedding [n, D] in float32, without positions."""
        table = self.model.text_model.embeddings.token_embedding
        with torch.no_grad():
            return table(ids.to(table.weight.device)).float()

    def text(self, ids: Tensor, rows: Tensor, schedule: PromptSchedule, added: Mapping[int, Tensor]) -> Tensor:
        """Text features [R, J] float32, not normalised, of `ids` [R, T] with prompts `added` at `rows` [R, n]."""
        with text_prompts(self.model.text_model, schedule.text, added, rows):
            return _features(self.model.get_text_features(input_ids=ids))

    def image(self, pixel_values: Tensor, schedule: PromptSchedule, added: Mapping[int, Tensor]) -> Tensor:
        """Image features [B, J] float32, not normalised, of `pixel_values` [B, 3, H, W] with prompts `added`."""
        with image_prompts(self.model.vision_model, schedule.vision, added, pooled_tokens=self.kind == "siglip"):
            pixel_values = pixel_values.to(self.model.dtype)
            return _features(self.model.get_image_features(pixel_values=pixel_values))

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosine similarities [B, K] of image features [B, J] and text features [K, J] or [B, K, J]."""
        image, text = normalised(images), normalised(texts)
        similarity = image @ text.T if text.dim() == 2 else torch.einsum("bj,bkj->bk", image, text)
        return self.scale * similarity + self.bias


def normalised(features: Tensor) -> Tensor:
    """Features of unit length."""
    return features / features.norm(dim=-1, keepdim=True)


def backbone_folder(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a backbone's checkpoint, fetched from the Hub where it is none here; UserError without one."""
    return checkpoint(backbone_source(os.fspath(path), revision)).folder


def backbone_source(path: str, revision: str | None = None) -> Source:
    """The backbone as `pipeline.hub.snapshots` asks for it."""
    return Source(path, revision, wanted="a CLIP's or SigLIP's", kinds=SUPPORTED)


def load_backbone(
    path: str | os.PathLike[str], revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Backbone, Any]:
    """The frozen backbone and its tokenizer from a folder or a Hub id.

    Raises UserError when there is none, it is of another kind, or weights are missing.
    """
    folder = backbone_folder(path, revision)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no readable config.json of a model: {error}") from error
    Sizes.of(config)
    try:
        model, report = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"The backbone in {folder} cannot be loaded: {error}") from error
    if report["missing_keys"]:
        raise UserError(
            f"The weights in {folder} lack {len(report['missing_keys'])} tensors, for example "
            f"{min(report['missing_keys'])}; they would be random. Give a complete checkpoint."
        )
    return Backbone(model), tokenizer


def _features(output: object) -> Tensor:
    features = projected(output)
    return features if features.dtype == torch.float64 else features.float()
