"""The interface of a model family: what differs between architectures. Everything else is shared in `LMM`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pipeline.data.image_sizes import ImageSizes


class LMMFamily:
    """A family of image-text-to-text models of transformers: seven questions, answered by attributes and methods.

    A subclass overrides the defaults here, which fit most families. `model` is the loaded transformers model
    (`...ForConditionalGeneration`), whose `model.model` holds vision tower, projector and decoder.

    1. Which checkpoints belong to it, and what loads them: `kind`, `processor`, `supports_vicuna_template`,
       `tower_attends`, `compiles_tower`.
    2. Where are its submodules: `decoder`, `projector`.
    3. How do images become features: `image_features`, `keeps_features`, `adopt`.
    4. How many tokens does an image of a given size take: `sizes`.
    5. Which tokens around the image belong to it, and how words are embedded: `image_prefix_tokens`,
       `image_suffix_tokens`, `scales_embeddings`.
    6. Which inputs does the decoder take beside embeddings and attention mask, and which positions do tokens get:
       `needs_image_mask`, `decoder_inputs`, `next_position`, `position_ids`, `needs_one_pass`.
    7. For which layers are the shortcuts exact: `lean_attentions`, `gated_mlps`.
    """

    # `model_type` in config.json.
    kind: ClassVar[str]
    # Name of the processor class of transformers; None: AutoProcessor chooses it.
    processor: ClassVar[str | None] = None
    # Whether model.template may be vicuna_v1, so that a checkpoint needs no chat template.
    supports_vicuna_template: ClassVar[bool] = False

    # Whether the vision tower has attention; transformers refuses a kernel for a model that has none.
    tower_attends: ClassVar[bool] = True

    # Whether the code of its vision tower's layers is the same for all images, so that it can be compiled.
    compiles_tower: ClassVar[bool] = True

    # Submodules of `model.model`.
    decoder: ClassVar[str] = "language_model"
    projector: ClassVar[str] = "multi_modal_projector"

    # Whether every image is one crop with the same number of features, so that the projector's input can be stored.
    keeps_features: ClassVar[bool] = False

    # Number and arrangement of tokens that the processor makes of an image, by its size.
    sizes: ClassVar[type[ImageSizes]]

    # Number of marker tokens directly before the first and after the last image token. Prompt sets inserted before or
    # after the image are placed outside of them.
    image_prefix_tokens: ClassVar[int] = 0
    image_suffix_tokens: ClassVar[int] = 0

    # Whether the embedding layer multiplies its rows, see `embedding_scale`.
    scales_embeddings: ClassVar[bool] = False

    # Whether `decoder_inputs` needs the image mask and the image tensors.
    needs_image_mask: ClassVar[bool] = False

    # Attention classes whose keys and values are only `k_proj` and `v_proj`, split into heads, and rotated by their
    # module's `apply_rotary_pos_emb`; see `last_layer`.
    lean_attentions: ClassVar[tuple[str, ...]] = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
    # MLP classes that compute exactly `down_proj(act_fn(gate_proj(x)) * up_proj(x))`; see `gated`.
    gated_mlps: ClassVar[tuple[str, ...]] = ("LlamaMLP", "MistralMLP", "Qwen2MLP")

    def __init__(self, model: Any) -> None:
        self.model = model
        # Factor from rows of the embedding's weight to the word embeddings that the decoder gets.
        self.embedding_scale = 1.0

    @classmethod
    def attention(cls, implementation: str) -> str | dict[str, str]:
        """What transformers takes for `attn_implementation`, for a recipe's attention kernel."""
        return implementation if cls.tower_attends else {"text_config": implementation, "vision_config": "eager"}

    @classmethod
    def image_spans(cls, places: Tensor) -> Tensor:
        """The places of image tokens [B, N] and of the marker tokens directly before and after an image."""
        spans = places
        for before in range(1, cls.image_prefix_tokens + 1):
            spans = spans | pad(places[:, before:], (0, before))
        for behind in range(1, cls.image_suffix_tokens + 1):
            spans = spans | pad(places[:, :-behind], (behind, 0))
        return spans

    def image_features(self, images: dict[str, Tensor]) -> Tensor:
        """Projected features [n, D] of all images, concatenated."""
        pooled = self.model.model.get_image_features(**images, return_dict=True).pooler_output
        return pooled.flatten(0, -2) if isinstance(pooled, Tensor) else torch.cat(list(pooled))

    def tower_features(self, images: dict[str, Tensor]) -> Tensor:
        """Input of the projector [n, tokens, width] for all images, for families with `keeps_features`."""
        read: list[Tensor] = []
        hook = self._projector.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        try:
            self.image_features(images)
        finally:
            hook.remove()
        return read[0]

    def projected(self, features: Tensor) -> Tensor:
        """Projected features [n, D] of the result of `tower_features`."""
        return self._projector(features).flatten(0, -2)

    @property
    def _projector(self) -> nn.Module:
        return self.model.model.get_submodule(self.projector)

    def adopt(self, processor: Any) -> None:
        """Copy settings that model.image_tokens changed in the processor into the model, where it reads them too."""

    def decoder_inputs(
        self, embeddings: Tensor, attention: Tensor, image_mask: Tensor | None, images: dict[str, Tensor] | None
    ) -> dict[str, Any]:
        """Arguments of the decoder for whole sequences, which may be padded on either side.

        Args:
            embeddings: [B, N, D], prompt vectors included, which are treated as words.
            attention: [B, N].
            image_mask: [B, N], which tokens are an image's; present for families with `needs_image_mask`.
            images: the batch's image tensors; present for the same families.
        """
        return {"attention_mask": attention}

    def next_position(self, attention: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Position [B] of the token after each sequence, whose `decoder_inputs` were `inputs`."""
        return attention.sum(1)

    def position_ids(self, positions: Tensor) -> Tensor:
        """The decoder's `position_ids` for words at these positions [B, S]."""
        return positions

    def needs_one_pass(self) -> str:
        """Why a sequence cannot be continued from a prefix cache; "" where it can."""
        text = self.model.config.text_config
        kinds = {*(getattr(text, "layer_types", None) or ())} - {"full_attention"}
        if kinds or (getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True) is not False):
            found = ", ".join(sorted(kinds)) or "sliding_attention"
            return (
                f"this {self.kind} has layers of kind {found}, which cannot continue from a prefix cache; full "
                "attention in all layers is needed"
            )
        return ""
