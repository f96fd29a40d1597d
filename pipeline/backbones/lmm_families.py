"""The families of multimodal models by the `model_type` of their config.json."""

from __future__ import annotations

import importlib

from pipeline.backbones.families.base import LMMFamily
from pipeline.errors import UserError

TARGETS = {
    "llava": "pipeline.backbones.families.llava:Llava",
    "llava_next": "pipeline.backbones.families.llava:LlavaNext",
    "qwen2_5_vl": "pipeline.backbones.families.qwen2_5_vl:Qwen25VL",
    "internvl": "pipeline.backbones.families.internvl:InternVL",
    "idefics3": "pipeline.backbones.families.idefics3:Idefics3",
    "smolvlm": "pipeline.backbones.families.idefics3:SmolVLM",
    "gemma3": "pipeline.backbones.families.gemma3:Gemma3",
}


def known_families() -> tuple[str, ...]:
    """The model_types that are supported."""
    return tuple(TARGETS)


def family_of(kind: str) -> type[LMMFamily]:
    """The family of a model_type; UserError for an architecture that is not supported."""
    if kind not in known_families():
        raise UserError(
            f"The model is of type '{kind}'; supported are {', '.join(known_families())}. "
            "Set model.path to a checkpoint of one of these in Hugging Face format."
        )
    module, _, name = TARGETS[kind].partition(":")
    family: type[LMMFamily] = getattr(importlib.import_module(module), name)
    return family


def require_kept_features(kind: str) -> None:
    """UserError for a model_type of which what the vision tower makes of an image cannot be kept."""
    if not family_of(kind).keeps_features:
        raise UserError(
            f"train.vision_features kept is not possible with a model of type {kind}, whose images have different "
            "numbers of crops or features; expected computed."
        )
