"""The families of multimodal models by the `model_type` of their config.json."""

from __future__ import annotations

from pipeline.backbones.families.base import LMMFamily
from pipeline.config import registry
from pipeline.errors import UserError


def known_families() -> tuple[str, ...]:
    """The supported model_types: those of this project, and those that installed packages register."""
    return tuple(registry.names("lmm_families"))


def family_of(kind: str) -> type[LMMFamily]:
    """The family of a model_type; UserError for an architecture that is not supported."""
    if kind not in known_families():
        raise UserError(
            f"The model is of type '{kind}'; supported are {', '.join(known_families())}. "
            "Set model.path to a checkpoint of one of these in Hugging Face format."
        )
    family: type[LMMFamily] = registry.load("lmm_families", kind)
    return family


def require_kept_features(kind: str) -> None:
    """Raise UserError for a model_type whose vision features cannot be stored."""
    if not family_of(kind).keeps_features:
        raise UserError(
            f"train.vision_features kept is not possible with a model of type {kind}, whose images have different "
            "numbers of crops or features; expected computed."
        )


def require_two_passes(family: LMMFamily, setting: str = "") -> None:
    """Raise UserError where `setting` needs a prefix cache, which this model does not support."""
    reason = family.needs_one_pass()
    if reason:
        setting = setting or "method.insertion: after_image"
        raise UserError(f"{setting} is not possible with this model: {reason}. Choose another value.")
