"""What sets model families apart, as questions that each family answers; everything else is shared in `LMM`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.data.image_sizes import ImageSizes


class LMMFamily:
    """One family of image-text-to-text models of transformers: seven questions, answered by attributes and methods.

    A subclass says what differs from the answers here, which are those of most families. `model` is the loaded model of
    transformers (`...ForConditionalGeneration`), whose `model.model` holds vision tower, projector and decoder.

    1. Which checkpoints are it, and what reads them: `kind`, `processor`, `supports_vicuna_template`.
    2. Where are its parts: `decoder`, `projector`.
    3. How do images become features: `image_features`, `keeps_features`, `adopt`.
    4. How many tokens does an image of some size take: `sizes`.
    5. Which tokens around the image belong to it: `image_prefix_tokens`, `image_suffix_tokens`.
    6. What does the decoder read beside embeddings and attention mask, and how do positions go on: `needs_image_mask`,
       `decoder_inputs`, `next_position`, `position_ids`, `needs_one_pass`.
    7. For which layers are the shortcuts exact: `lean_attentions`, `gated_mlps`.
    """

    # `model_type` in config.json.
    kind: ClassVar[str]
    # Name of the class of transformers that reads the processor, None: what AutoProcessor finds.
    processor: ClassVar[str | None] = None
    # Whether model.template may be vicuna_v1, and a checkpoint be without a chat template.
    supports_vicuna_template: ClassVar[bool] = False

    # Submodules of `model.model`.
    decoder: ClassVar[str] = "language_model"
    projector: ClassVar[str] = "multi_modal_projector"

    # Whether every image is one crop with as many features, so that what the projector reads can be kept on disk.
    keeps_features: ClassVar[bool] = False

    # What the processor makes of an image by its size.
    sizes: ClassVar[type[ImageSizes]]

    # Tokens directly before the first image token that only announce the image, and behind the last that only end it.
    # Prompt sets that stand before or after the image stand outside of them.
    image_prefix_tokens: ClassVar[int] = 0
    image_suffix_tokens: ClassVar[int] = 0

    # Whether `decoder_inputs` must be told which tokens are the image's, and its image tensors.
    needs_image_mask: ClassVar[bool] = False

    # Classes of attention whose keys and values are made by `k_proj` and `v_proj`, divided into heads, and rotated by
    # the module's own `apply_rotary_pos_emb`, and nothing else; see `last_layer`.
    lean_attentions: ClassVar[tuple[str, ...]] = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
    # Classes of MLP that are `down_proj(act_fn(gate_proj(x)) * up_proj(x))` and nothing else; see `gated`.
    gated_mlps: ClassVar[tuple[str, ...]] = ("LlamaMLP", "MistralMLP", "Qwen2MLP")

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

    @property
    def _projector(self) -> nn.Module:
        return self.model.model.get_submodule(self.projector)

    def adopt(self, processor: Any) -> None:
        """Take over what of the processor's settings the model must agree with, where model.image_tokens set them."""

    def decoder_inputs(
        self, embeddings: Tensor, attention: Tensor, image_mask: Tensor | None, images: dict[str, Tensor] | None
    ) -> dict[str, Any]:
        """Arguments of the decoder for whole sequences, which may be padded on either side.

        Args:
            embeddings: [B, N, D], prompt vectors among them, which count as words.
            attention: [B, N].
            image_mask: [B, N], which tokens are an image's; given where `needs_image_mask`.
            images: the batch's image tensors; given where `needs_image_mask`.
        """
        return {"attention_mask": attention}

    def next_position(self, attention: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Position [B] of the token behind each sequence, which the decoder got with these `decoder_inputs`."""
        return attention.sum(1)

    def position_ids(self, positions: Tensor) -> Tensor:
        """The decoder's position argument for words at these positions [B, S]."""
        return positions

    def needs_one_pass(self) -> str:
        """Why the keys and values of a prefix alone are not enough to go on from; "" where they are."""
        text = self.model.config.text_config
        kinds = {*(getattr(text, "layer_types", None) or ())} - {"full_attention"}
        if kinds or (getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True) is not False):
            found = ", ".join(sorted(kinds)) or "sliding_attention"
            return (
                f"this {self.kind} has layers of kind {found}, for which the keys and values of a beginning alone "
                "are not enough; full attention in all layers is needed"
            )
        return ""
