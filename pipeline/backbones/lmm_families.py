"""What sets the supported architectures apart; everything else is shared in `LMM`.

A family says how images become features, and what the decoder has to know beside embeddings and attention mask once
prompt vectors stand among the tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.errors import UserError


class Family:
    """LLaVA's way, which the others follow where they do not say otherwise."""

    kind: ClassVar[str]  # model_type in config.json
    decoder: ClassVar[str] = "language_model"
    projector: ClassVar[str] = "multi_modal_projector"
    processor: ClassVar[str | None] = None  # class to read the processor with, where the checkpoint's needs more
    vicuna: ClassVar[bool] = False  # whether the conversation of LLaVA-1.5 is one the model could know
    # Whether the decoder must know which tokens are the image's, see `decoder_inputs`.
    reads_places: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        self.model = model
        # Word vectors are this times the rows of the embedding's weight.
        self.embedding_scale = 1.0

    def image_features(self, images: dict[str, Tensor]) -> Tensor:
        """Projected features [n, D] of all images, one after the other."""
        pooled = self.model.model.get_image_features(**images, return_dict=True).pooler_output
        return pooled.flatten(0, -2) if isinstance(pooled, Tensor) else torch.cat(list(pooled))

    def decoder_inputs(
        self, embeddings: Tensor, attention: Tensor, places: Tensor, images: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Arguments of the decoder beside the embeddings [B, N, D].

        `places` [B, N] are the image's tokens (only given when `reads_places`), `images` the batch's image tensors.
        """
        return {"attention_mask": attention}

    def generation_inputs(
        self, embeddings: Tensor, attention: Tensor, places: Tensor, images: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The same for `generate`, which builds masks and continues positions itself."""
        return {"attention_mask": attention}


class Llava(Family):
    """LLaVA-1.5."""

    kind = "llava"
    vicuna = True


FAMILIES: dict[str, type[Family]] = {family.kind: family for family in (Llava,)}


def family_of(kind: str) -> type[Family]:
    """The family of a model_type; UserError for an architecture that is not supported."""
    if kind not in FAMILIES:
        raise UserError(
            f"The model is of type '{kind}'; supported are {', '.join(FAMILIES)}. "
            "Set model.path to a checkpoint of one of these in Hugging Face format."
        )
    return FAMILIES[kind]
