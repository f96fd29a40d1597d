"""Reads a checkpoint's processor: tokenizer, image processor and chat template, for still images alone."""

from __future__ import annotations

import hashlib
from typing import Any

from PIL import Image
from safetensors import SafetensorError

from pipeline.backbones.image_tokens import limit_image_tokens
from pipeline.backbones.lmm_families import FAMILIES, Family, family_of
from pipeline.config import ModelConfig
from pipeline.errors import UserError
from pipeline.pickled import SETTINGS
from pipeline.snapshots import Source, settings_folder

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError)
VIDEOS = "video_processor"


def source_of(config: ModelConfig) -> Source:
    """The model as `pipeline.snapshots` asks for it."""
    return Source(config.location, config.revision, kinds=tuple(FAMILIES))


def load_processor(config: ModelConfig) -> Any:
    """The processor of a checkpoint; images go through the PIL backend.

    Raises UserError when there is none, or when the architecture is not supported or not with these settings.
    """
    import transformers

    # One backend everywhere: torchvision resizes differently, so answers would depend on what is installed.
    folder = settings_folder(source_of(config))
    try:
        model = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family = family_of(model.model_type)
        reader = transformers.AutoProcessor
        if family.processor is not None:
            reader = without_videos(getattr(transformers, family.processor))
        processor = reader.from_pretrained(folder, trust_remote_code=False, backend="pil")
    except LOAD_ERRORS as error:
        raise not_loadable(config, error) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"model.path '{config.path}' has no image processor or no tokenizer. Expected an "
            "image-text-to-text checkpoint with processor_config.json or preprocessor_config.json and tokenizer files."
        )
    _check_template(config, family, processor)
    limit_image_tokens(processor, config.image_tokens)
    return processor


def settings_fingerprint(config: ModelConfig) -> str:
    """SHA-256 (hex) of the files beside the weights that an answer depends on, all but config.json.

    That one is part of `base_fingerprint`. Raises UserError when the checkpoint cannot be had.
    """
    folder = settings_folder(source_of(config))
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SETTINGS for path in folder.glob(pattern)}):
        if path.name != "config.json" and not path.name.endswith(".index.json"):
            content = path.read_bytes()
            digest.update(f"{path.name}:{len(content)}:".encode() + content)
    if config.image_tokens is not None:
        digest.update(f"image_tokens:{config.image_tokens}".encode())
    return digest.hexdigest()


def without_videos(processor: Any) -> Any:
    """The processor class without its part for videos, which transformers only has for torchvision."""
    parts = processor.get_attributes()
    if VIDEOS not in parts:
        return processor

    class StillImages(processor):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in parts if part != VIDEOS]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            rest = iter(args)
            args = [None if part == VIDEOS else next(rest) for part in parts]
            fields = {name: value for name, value in processor_dict.items() if name != VIDEOS}
            return super().from_args_and_dict(args, fields, **kwargs)

    StillImages.__name__ = StillImages.__qualname__ = processor.__name__
    return StillImages


def not_loadable(config: ModelConfig, error: BaseException) -> UserError:
    """The sentence for a checkpoint that transformers cannot load."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"The model '{config.path}' cannot be loaded ({first}). Expected a folder or Hugging Face id of an "
        "image-text-to-text model with its processor; check model.path and model.revision."
    )


def _check_template(config: ModelConfig, family: type[Family], processor: Any) -> None:
    if family.vicuna:
        return
    if config.template == "vicuna_v1":
        raise UserError(
            f"model.template is vicuna_v1, but '{config.path}' is of type '{family.kind}', which marks images and "
            "turns in its own way. Set model.template to auto."
        )
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"model.path '{config.path}' has no chat template; a model of type '{family.kind}' needs one to mark "
            "images and turns. Put the checkpoint's chat_template.jinja beside it."
        )


def check_image_size(config: ModelConfig, model: Any, processor: Any) -> None:
    """Raise UserError when the processor's images have not the size that the vision tower of `model` takes."""
    expected = getattr(getattr(model, "vision_config", None), "image_size", None)
    if expected is None:
        return
    sides = [expected, expected] if isinstance(expected, int) else list(expected)
    pixels = processor.image_processor(Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
    found = list(pixels.shape[-2:])
    if found != sides:
        raise UserError(
            f"The image processor of '{config.path}' makes images of {found[0]}x{found[1]} pixels, its vision tower "
            f"takes {sides[0]}x{sides[1]}. Mend preprocessor_config.json or processor_config.json beside the model."
        )
