"""The sections `model` and `keys`: the frozen multimodal model, and the frozen CLIP of the routing keys."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.base import Section
from pipeline.config.given_paths import GivenPath
from pipeline.config.paths import locate

KeysSource = tuple[
    str, str | None, Literal["projected", "pooled"], Literal["head", "tail"], Literal["clip", "siglip", "own"]
]


class ModelConfig(Section):
    """The frozen multimodal model."""

    path: GivenPath = Field(description="Hugging Face id, or folder of a checkpoint")
    revision: str | None = Field(None, description="commit of the Hugging Face repository")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the frozen weights and the step")
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="int8, nf4: the weights of the decoder's linear layers are stored in 8 or 4 bits and computed with "
        "in `dtype`; not under ZeRO-3 (docs/models.md)",
    )
    tf32: bool = Field(
        False,
        description="true: products of float32 numbers in TensorFloat-32 on GPUs, whose inputs have 10 bits of "
        "mantissa; routing keys stay in float32; nothing on CPUs",
    )
    attn_implementation: str = Field(
        "sdpa",
        description="attention kernel, as transformers names it; flash_attention_2 needs a GPU, bfloat16 and "
        "the package flash-attn (docs/scaling.md)",
    )
    max_length: int = Field(2048, ge=1, description="longest sequence in tokens, prompts and image included")
    template: Literal["auto", "vicuna_v1"] = Field(
        "auto",
        description="the conversation: that of the checkpoint's chat template (without one, USER: and ASSISTANT:), or "
        "LLaVA-1.5's with its system prompt",
    )
    image_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of one image, by the processor's own setting (pixels of Qwen2.5-VL, tiles of "
        "InternVL, the longest edge of Idefics3 and SmolVLM, pan-and-scan of Gemma 3, grids of LLaVA-NeXT); null: the "
        "checkpoint's own setting",
    )
    image_padding: Literal["none", "square", "stretch"] = Field(
        "none",
        description="none: what the processor does, which for LLaVA-1.5 cuts wide and high images to their centre; "
        "square: pad images to squares with the processor's mean colour first, as LLaVA's own code; stretch: resize "
        "images whole to the one size that the model sees",
    )

    @model_validator(mode="after")
    def _tf32_is_of_float32(self) -> ModelConfig:
        if self.tf32 and self.dtype != "float32":
            raise ValueError(
                f"tf32 changes products of float32 numbers, and dtype is {self.dtype}; leave one of them out"
            )
        return self

    @property
    def location(self) -> str:
        """What to give to from_pretrained: see `locate`."""
        return locate(self.path)


class KeysConfig(Section):
    """The frozen model that computes the routing keys of images and questions."""

    kind: Literal["clip", "siglip", "own"] = Field(
        "clip",
        description="clip: a CLIP; siglip: a SigLIP, or a SigLIP 2 of one image size; own: mean vision features and "
        "mean word embeddings of a llava or fast_vlm, where no dual encoder is at hand",
    )
    path: GivenPath = Field(
        description="Hugging Face id, or folder of its checkpoint; with kind own by default model.path"
    )
    revision: str | None = Field(None, description="commit of the Hugging Face repository")
    text_feature: Literal["projected", "pooled"] = Field(
        "projected", description="projected: CLIP's joint space; pooled: before the projection, as in the official code"
    )
    text_truncation: Literal["head", "tail"] = Field(
        "head", description="for questions longer than CLIP's 77 tokens: keep the start (head, as CLIP does) or the end"
    )
    batch: int = Field(64, ge=1, description="samples per forward pass while preparing")

    @model_validator(mode="after")
    def _pooled_text_is_of_clip(self) -> KeysConfig:
        if self.kind != "clip" and self.text_feature != "projected":
            raise ValueError(
                f"kind {self.kind} has one feature of a text; expected text_feature projected, or kind clip"
            )
        return self

    @property
    def location(self) -> str:
        """What to give to from_pretrained: see `locate`."""
        return locate(self.path)

    @property
    def source(self) -> KeysSource:
        """The arguments of `key_identity` and `key_encoder` that identify the model and its features."""
        return self.location, self.revision, self.text_feature, self.text_truncation, self.kind
