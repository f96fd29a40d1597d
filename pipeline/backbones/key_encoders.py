"""What computes routing keys, by `keys.kind`: a CLIP, a SigLIP, or a multimodal model's own (docs/design.md 4.3)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from PIL import Image
from torch.nn.functional import pad

from pipeline.backbones.clip import KeyEncoder, Kind, TextFeature, Truncation, load_key_model, projected
from pipeline.backbones.lmm import load_lmm
from pipeline.config.models import ModelConfig
from pipeline.data.image_sizes import image_sizes
from pipeline.errors import UserError


def key_encoder(
    path: str | os.PathLike[str],
    revision: str | None = None,
    text_feature: TextFeature = "projected",
    text_truncation: Truncation = "head",
    kind: Kind = "clip",
    device: torch.device | str | None = None,
    tf32: bool = False,
) -> KeyEncoder:
    """The encoder of a kind; arguments and errors are those of `KeyEncoder`."""
    chosen = {"clip": KeyEncoder, "siglip": SiglipKeys, "own": OwnKeys}[kind]
    return chosen(path, revision, text_feature, text_truncation, device, tf32)


class SiglipKeys(KeyEncoder):
    """Keys of a SigLIP, or of a SigLIP 2 of one image size: its image and text features, which share a space.

    Texts are padded to the model's context, as it was trained.
    """

    kind: ClassVar[Kind] = "siglip"

    def _load(self, folder: Path) -> None:
        from transformers import SiglipModel

        self.model = load_key_model(SiglipModel, folder, "SigLIP").to(self.device)
        config = self.model.config
        self.width = int(config.vision_config.hidden_size)
        texts = getattr(config.text_config, "projection_size", None) or config.text_config.hidden_size
        if texts != self.width:
            raise UserError(
                f"The SigLIP in {folder} has image features of width {self.width} and text features of width "
                f"{texts}; expected the same width."
            )
        self._load_processors(folder, config.text_config.max_position_embeddings)

    def text(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.max_text, return_tensors="pt"
        ).to(self.device)
        with torch.no_grad(), self._matmuls():
            return projected(self.model.get_text_features(input_ids=tokens["input_ids"])).float().cpu()


class OwnKeys(KeyEncoder):
    """Keys of a multimodal model's own: the means of an image's features before the projector, and of word embeddings.

    They share no space, as CLIP's do: the narrower ones are filled up with zeros, which changes no cosine.
    """

    kind: ClassVar[Kind] = "own"

    def _load(self, folder: Path) -> None:
        lmm = load_lmm(ModelConfig(path=str(folder)), device=self.device)
        if not lmm.family.keeps_features:
            raise UserError(
                f"keys.kind is own, and {folder} is of type {lmm.family.kind}, whose images have different "
                "numbers of features; expected a llava or a fast_vlm. Set keys.kind to clip or siglip, and keys.path."
            )
        self.lmm, self.processor, self.tokenizer = lmm, lmm.processor.image_processor, lmm.tokenizer
        self._sizes = image_sizes(lmm.processor)
        blank = self.pixels([Image.new("RGB", (8, 8))])
        self.width = max(self._tower(blank).shape[-1], lmm.width)
        self.max_text = lmm.conversation.max_length

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        prepared = [self._sizes.prepared(image) for image in images]
        return self.processor(images=prepared, return_tensors="pt")["pixel_values"]

    def image(self, images: Sequence[Image.Image] | torch.Tensor) -> torch.Tensor:
        return self._filled(self._tower(images if isinstance(images, torch.Tensor) else self.pixels(images)))

    def text(self, texts: Sequence[str]) -> torch.Tensor:
        side = slice(None, self.max_text) if self.head else slice(-self.max_text, None)
        rows = []
        for text in texts:
            tokens = self.tokenizer(text or " ", add_special_tokens=False)["input_ids"][side]
            rows.append(self.lmm.vocabulary_rows(torch.tensor(tokens)).mean(0))
        return self._filled(torch.stack(rows))

    def _tower(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self._matmuls():
            return self.lmm.tower_features({"pixel_values": pixels.to(self.device)}).mean(1).float().cpu()

    def _filled(self, keys: torch.Tensor) -> torch.Tensor:
        return pad(keys, (0, self.width - keys.shape[-1]))
