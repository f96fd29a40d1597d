"""The frozen CLIP or SigLIP backbone, from any Hugging Face checkpoint of either."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from pipeline.backbones.clip import projected
from pipeline.clip.towers.inject import Additions, averaged_embeddings, image_prompts, text_prompts
from pipeline.clip.towers.schedule import PromptSchedule
from pipeline.clip.towers.text import Words
from pipeline.errors import UserError, nearest
from pipeline.hub.snapshots import Source, checkpoint

SUPPORTED = ("clip", "siglip")


@dataclass(frozen=True)
class Sizes:
    """The sizes that prompts have to match: blocks and width of each tower, and the width of the joint space."""

    text_blocks: int
    text_width: int
    vision_blocks: int
    vision_width: int
    joint: int

    @property
    def blocks(self) -> tuple[int, int]:
        """The number of blocks of the text tower and of the image tower."""
        return self.text_blocks, self.vision_blocks

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """The sizes in a Hugging Face configuration; UserError for another type of model."""
        if config.model_type not in SUPPORTED:
            raise UserError(
                f"The backbone is a model of type '{config.model_type}'; supported: {', '.join(SUPPORTED)}."
                f"{nearest(config.model_type, SUPPORTED)} Set model.path to a CLIP or SigLIP in Hugging Face format."
            )
        text, vision = config.text_config, config.vision_config
        joint = config.projection_dim if config.model_type == "clip" else vision.hidden_size
        return cls(text.num_hidden_layers, text.hidden_size, vision.num_hidden_layers, vision.hidden_size, joint)


class Backbone(nn.Module):
    """A frozen `CLIPModel` or `SiglipModel` in eval mode; prompts are inserted by hooks, its code is not changed.

    Only submodules are called and weights are never used directly, so that ZeRO-3 gathers them (docs/design.md 7.2).
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
        # Copies of the logit scale and bias as buffers, because ZeRO-3 shards the parameters themselves.
        self.register_buffer("scale", model.logit_scale.detach().float().exp().reshape(()), persistent=False)
        bias = getattr(model, "logit_bias", torch.zeros((), device=model.logit_scale.device))
        self.register_buffer("bias", bias.detach().float().reshape(()).clone(), persistent=False)

    def train(self, mode: bool = True) -> Backbone:
        """Keep eval mode, so that the frozen model computes the same in training and at inference."""
        return super().train(False)

    @property
    def causal(self) -> bool:
        """Whether text attention is causal; then padding after the end token does not change the feature."""
        return self.kind == "clip"

    def words(self, tokenizer: Any, shorten: bool | None = None) -> Words:
        """The tokenizer for the text tower; `shorten` drops padding (None: wherever attention is causal)."""
        length = self.model.config.text_config.max_position_embeddings
        return Words(tokenizer, length, self.causal if shorten is None else shorten and self.causal)

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Rows [n, D] of the token embedding in float32, without position embeddings."""
        table = self.model.text_model.embeddings.token_embedding
        with torch.no_grad():
            return table(ids.to(table.weight.device)).float()

    def text(
        self,
        ids: Tensor,
        rows: Tensor,
        schedule: PromptSchedule,
        added: Additions,
        averaged: Tensor | None = None,
    ) -> Tensor:
        """Text features [R, J] in float32, not normalised.

        Args:
            ids: token ids [R, T].
            rows: positions [R, n] of the prompts in each sequence.
            schedule: the operations of each block.
            added: prompts by block.
            averaged: token ids [M, R, T] whose mean token embedding stands for that of `ids`; None: that of `ids`.
        """
        with ExitStack() as stack:
            if averaged is not None:
                # One of the M at a time: ids are small, their embeddings are not.
                total = sum((self.embedding_rows(part) for part in averaged), torch.zeros((), device=ids.device))
                stack.enter_context(averaged_embeddings(self.model.text_model, total / len(averaged)))
            stack.enter_context(text_prompts(self.model.text_model, schedule.text, added, rows))
            return _features(self.model.get_text_features(input_ids=ids))

    def image(self, pixel_values: Tensor, schedule: PromptSchedule, added: Additions) -> Tensor:
        """Image features [B, J] in float32, not normalised, of `pixel_values` [B, 3, H, W] with prompts `added`."""
        with image_prompts(self.model.vision_model, schedule.vision, added, pooled_tokens=self.kind == "siglip"):
            pixel_values = pixel_values.to(self.model.dtype)
            return _features(self.model.get_image_features(pixel_values=pixel_values))

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosine similarities [B, K] of image features [B, J] and text features [K, J] or [B, K, J]."""
        image, text = normalised(images), normalised(texts)
        similarity = image @ text.T if text.dim() == 2 else torch.einsum("bj,bkj->bk", image, text)
        return self.scale * similarity + self.bias


def normalised(features: Tensor) -> Tensor:
    """Features scaled to unit length."""
    return features / features.norm(dim=-1, keepdim=True)


def backbone_folder(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a backbone's checkpoint, fetched from the Hub unless `path` is a folder; UserError without one."""
    return checkpoint(backbone_source(os.fspath(path), revision)).folder


def backbone_source(path: str, revision: str | None = None) -> Source:
    """The source of the backbone's checkpoint, for `pipeline.hub.snapshots`."""
    return Source(path, revision, wanted="a CLIP's or SigLIP's", kinds=SUPPORTED)


def load_backbone(
    path: str | os.PathLike[str], revision: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[Backbone, Any]:
    """The frozen backbone and its tokenizer from a folder or a Hub id.

    Raises UserError when there is no checkpoint, it is of another type, or weights are missing.
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
