"""The sections `model` and `keys`: the frozen multimodal model, and the frozen CLIP of the routing keys."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.config.base import Section
from pipeline.config.paths import locate
from pipeline.files.paths import GivenPath


class ModelConfig(Section):
    """The frozen multimodal model."""

    path: GivenPath = Field(description="Hugging Face id, or folder of a checkpoint")
    revision: str | None = Field(None, description="commit of the Hugging Face repository")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="precision of the frozen weights and the step")
    attn_implementation: str = Field("sdpa", description="attention kernel, as transformers names it")
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
    image_padding: Literal["none", "square"] = Field(
        "none", description="square: pad images to squares with the processor's mean colour first, as LLaVA's own code"
    )

    @property
    def location(self) -> str:
        """What to give to from_pretrained: see `locate`."""
        return locate(self.path)


class KeysConfig(Section):
    """The frozen CLIP that computes the routing keys of images and questions."""

    path: GivenPath = Field(description="Hugging Face id, or folder of a CLIP checkpoint")
    revision: str | None = Field(None, description="commit of the Hugging Face repository")
    text_feature: Literal["projected", "pooled"] = Field(
        "projected", description="projected: CLIP's joint space; pooled: before the projection, as in the official code"
    )
    text_truncation: Literal["head", "tail"] = Field(
        "head", description="for questions longer than CLIP's 77 tokens: keep the start (head, as CLIP does) or the end"
    )
    batch: int = Field(64, ge=1, description="samples per forward pass while preparing")

    @property
    def location(self) -> str:
        """What to give to from_pretrained: see `locate`."""
        return locate(self.path)

    @property
    def source(self) -> tuple[str, str | None, Literal["projected", "pooled"], Literal["head", "tail"]]:
        """The arguments of `key_identity` and `KeyEncoder` that identify the CLIP and its features."""
        return self.location, self.revision, self.text_feature, self.text_truncation
