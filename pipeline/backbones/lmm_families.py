"""What sets the supported architectures apart; everything else is shared in `LMM`.

A family says how images become features, and what the decoder has to know beside embeddings and attention mask once
prompt vectors stand among the tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.errors import UserError


class Family:
    """LLaVA's way, which the others follow where they do not say otherwise."""

    kind: ClassVar[str]  # model_type in config.json
    decoder: ClassVar[str] = "language_model"
    projector: ClassVar[str] = "multi_modal_projector"
    processor: ClassVar[str | None] = None  # class to read the processor with, where the checkpoint's needs more
    supports_vicuna_template: ClassVar[bool] = (
        False  # whether the conversation of LLaVA-1.5 is one the model could know
    )
    image_prefix_tokens: ClassVar[int] = 0  # tokens directly before the first image token that only announce the image
    image_suffix_tokens: ClassVar[int] = 0  # tokens directly behind the last image token that only end the image
    # Whether the decoder must know which tokens are the image's, see `decoder_inputs`.
    needs_image_mask: ClassVar[bool] = False
    # Whether every image is one crop with as many features, so that what the projector reads can be kept.
    keeps_features: ClassVar[bool] = False

    def __init__(self, model: Any) -> None:
        self.model = model
        # Word vectors are this times the rows of the embedding's weight.
        self.embedding_scale = 1.0

    def image_features(self, images: dict[str, Tensor]) -> Tensor:
        """Projected features [n, D] of all images, one after the other."""
        pooled = self.model.model.get_image_features(**images, return_dict=True).pooler_output
        return pooled.flatten(0, -2) if isinstance(pooled, Tensor) else torch.cat(list(pooled))

    def tower_features(self, images: dict[str, Tensor]) -> Tensor:
        """What the projector reads of all images [n, tokens, width], where `keeps_features`."""
        read: list[Tensor] = []
        hook = self._projector.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            self.image_features(images)
        finally:
            hook.remove()
        return read[0]

    def projected(self, features: Tensor) -> Tensor:
        """Projected features [n, D] of what `tower_features` gave."""
        return self._projector(features).flatten(0, -2)

    def adopt(self, processor: Any) -> None:
        """Take over what of the processor's settings the model must agree with, where model.image_tokens set them."""

    @property
    def _projector(self) -> nn.Module:
        return self.model.model.get_submodule(self.projector)

    def decoder_inputs(
        self, embeddings: Tensor, attention: Tensor, places: Tensor, images: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Arguments of the decoder beside the embeddings [B, N, D].

        `places` [B, N] are the image's tokens (only given when `needs_image_mask`), `images` the batch's image tensors.
        """
        return {"attention_mask": attention}

    def needs_one_pass(self) -> str:
        """Why a sequence cannot be computed in two passes, its beginning first; "" where it can."""
        kinds = {*(getattr(self.model.config.text_config, "layer_types", None) or ())} - {"full_attention"}
        if kinds or (getattr(self.model.config.text_config, "sliding_window", None) and not self._window_is_off()):
            found = ", ".join(sorted(kinds)) or "sliding_attention"
            return (
                f"this {self.kind} has layers of kind {found}, for which the keys and values of a beginning alone "
                "are not enough; full attention in all layers is needed"
            )
        return ""

    def _window_is_off(self) -> bool:
        return getattr(self.model.config.text_config, "use_sliding_window", True) is False

    def next_position(self, attention: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Position [U] of the token behind each of U beginnings, which the decoder got with these `inputs`."""
        return attention.sum(1)

    def position_ids(self, positions: Tensor) -> Tensor:
        """The decoder's position argument for words at these positions [B, S]."""
        return positions


class Llava(Family):
    """LLaVA-1.5."""

    kind = "llava"
    supports_vicuna_template = True
    keeps_features = True


class LlavaNext(Family):
    """LLaVA-NeXT (1.6): crops of the image, each row of features ended by a learned vector.

    That vector is a bare weight of a module whose forward is never called; DeepSpeed gathers it when it is read.
    """

    kind = "llava_next"
    supports_vicuna_template = True

    def adopt(self, processor: Any) -> None:
        # The model puts an image's crops together again by these.
        self.model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints


class Qwen25VL(Family):
    """Qwen2.5-VL: images of any size; positions are (time, row, column), see M-RoPE in arXiv 2409.12191."""

    kind = "qwen2_5_vl"
    projector = "visual.merger"
    processor = "Qwen2_5_VLProcessor"
    image_prefix_tokens = 1  # <|vision_start|>
    image_suffix_tokens = 1  # <|vision_end|>
    needs_image_mask = True

    def decoder_inputs(
        self, embeddings: Tensor, attention: Tensor, places: Tensor, images: dict[str, Tensor]
    ) -> dict[str, Any]:
        # Prompt vectors count as words. The first argument gives only shape and type.
        positions, _ = self.model.model.get_rope_index(
            attention,
            mm_token_type_ids=places.long(),
            attention_mask=attention,
            image_grid_thw=images["image_grid_thw"],
        )
        return {"attention_mask": attention, "position_ids": positions}  # positions [3, B, N]

    def next_position(self, attention: Tensor, inputs: dict[str, Any]) -> Tensor:
        # An image takes fewer positions than it has tokens: the longer of its sides.
        return inputs["position_ids"].masked_fill(~attention.bool(), 0).amax((0, 2)) + 1

    def position_ids(self, positions: Tensor) -> Tensor:
        return positions.expand(3, -1, -1)


class InternVL(Family):
    """InternVL in the form of transformers ("-hf"): square crops."""

    kind = "internvl"
    processor = "InternVLProcessor"
    image_prefix_tokens = 1  # <img>
    image_suffix_tokens = 1  # </img>


class Idefics3(Family):
    """Idefics3: square crops, padded to the same number per sample, which one flat list of crops makes needless."""

    kind = "idefics3"
    decoder = "text_model"
    projector = "connector"
    image_prefix_tokens = 2  # <fake_token_around_image> and a row and column, or <global-img>
    image_suffix_tokens = 1  # <fake_token_around_image>

    def image_features(self, images: dict[str, Tensor]) -> Tensor:
        return super().image_features({name: value[None] for name, value in images.items()})


class SmolVLM(Idefics3):
    """SmolVLM: Idefics3 with videos; its processor class differs from Idefics3's in them alone."""

    kind = "smolvlm"
    processor = "Idefics3Processor"


class Gemma3(Family):
    """Gemma 3: the tokens of an image see each other in both directions; word vectors are scaled."""

    kind = "gemma3"
    image_prefix_tokens = 1  # <start_of_image>
    image_suffix_tokens = 1  # <end_of_image>
    needs_image_mask = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise UserError(
                f"Gemma 3 with attention '{model.config._attn_implementation}' cannot let an image's tokens see each "
                "other; expected sdpa or eager. Set model.attn_implementation."
            )
        self.embedding_scale = model.config.text_config.hidden_size**0.5

    def decoder_inputs(
        self, embeddings: Tensor, attention: Tensor, places: Tensor, images: dict[str, Tensor]
    ) -> dict[str, Any]:
        masks = self.model.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=embeddings,
            attention_mask=attention,
            past_key_values=None,
            position_ids=None,
            token_type_ids=places.long(),
        )
        return {"attention_mask": masks}  # one for full, one for sliding attention

    def needs_one_pass(self) -> str:
        return (
            "Gemma 3 has layers that see a window of the tokens, which cannot go on from the keys and values of a "
            "beginning"
        )


FAMILIES: dict[str, type[Family]] = {
    family.kind: family for family in (Llava, LlavaNext, Qwen25VL, InternVL, Idefics3, SmolVLM, Gemma3)
}


def require_kept_features(kind: str) -> None:
    """UserError for a model_type of which what the vision tower makes of an image cannot be kept."""
    if not family_of(kind).keeps_features:
        raise UserError(
            f"train.vision_features kept is not possible with a model of type {kind}, whose images have different "
            "numbers of crops or features; expected computed."
        )


def family_of(kind: str) -> type[Family]:
    """The family of a model_type; UserError for an architecture that is not supported."""
    if kind not in FAMILIES:
        raise UserError(
            f"The model is of type '{kind}'; supported are {', '.join(FAMILIES)}. "
            "Set model.path to a checkpoint of one of these in Hugging Face format."
        )
    return FAMILIES[kind]
