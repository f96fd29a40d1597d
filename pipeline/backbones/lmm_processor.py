"""Loads a checkpoint's processor: tokenizer, image processor and chat template, for still images only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError

from pipeline.backbones.families.base import LMMFamily
from pipeline.backbones.lmm_families import family_of, known_families
from pipeline.backbones.quick_import import import_model_classes
from pipeline.config.models import ModelConfig
from pipeline.data.image_sizes import know_image_sizes, limit_image_tokens
from pipeline.errors import UserError
from pipeline.hub.pickled import SETTINGS
from pipeline.hub.snapshots import Source, settings_folder

LOAD_ERRORS = (OSError, ValueError, KeyError, ImportError, SafetensorError)
VIDEOS = "video_processor"
# Part of the fingerprint of answers with a repetition penalty. Versions without it decoded with transformers' generate,
# which did not penalise the first tokens of a padded row, so their answers depended on the batch and are not reused.
PENALISED = "repetition_penalty:all_tokens"


def source_of(config: ModelConfig) -> Source:
    """The model's location as `pipeline.hub.snapshots` takes it."""
    return Source(config.location, config.revision, kinds=known_families())


def load_processor(config: ModelConfig) -> Any:
    """The processor of a checkpoint, with the PIL backend for images.

    Raises UserError when it is missing, or when the architecture is not supported, or not with these settings.
    """
    import_model_classes()
    import transformers

    # PIL on every machine: torchvision resizes differently, so answers would depend on whether it is installed.
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
    _complete(processor, model, folder)
    _check_template(config, family, processor)
    know_image_sizes(processor, family.sizes)
    limit_image_tokens(processor, config.image_tokens)
    return processor


def settings_fingerprint(config: ModelConfig, repetition_penalty: float | str = "checkpoint") -> str:
    """SHA-256 (hex) of the files besides the weights that an answer depends on, without config.json.

    config.json is part of `base_fingerprint`. A `repetition_penalty` is added where it differs from the checkpoint's
    own, which is in these files. Raises UserError when the checkpoint cannot be fetched.
    """
    folder = settings_folder(source_of(config))
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SETTINGS for path in folder.glob(pattern)}):
        if path.name != "config.json" and not path.name.endswith(".index.json"):
            content = path.read_bytes()
            digest.update(f"{path.name}:{len(content)}:".encode() + content)
    if config.image_tokens is not None:
        digest.update(f"image_tokens:{config.image_tokens}".encode())
    own = own_penalty(folder)
    penalty = own if repetition_penalty == "checkpoint" else repetition_penalty
    if penalty != own:
        digest.update(f"repetition_penalty:{repetition_penalty}".encode())
    if penalty != 1:
        digest.update(PENALISED.encode())
    return digest.hexdigest()


def own_penalty(folder: Path) -> float:
    """A checkpoint's own repetition penalty; 1: none."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            return float(json.loads((folder / name).read_text("utf-8")).get("repetition_penalty") or 1.0)
    return 1.0


def without_videos(processor: Any) -> Any:
    """The processor class without its video processor, for which transformers requires torchvision."""
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
    """The error for a checkpoint that transformers cannot load."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(
        f"The model '{config.path}' cannot be loaded ({first}). Expected a folder or Hugging Face id of an "
        "image-text-to-text model with its processor; check model.path and model.revision."
    )


def _complete(processor: Any, model: Any, folder: Path) -> None:
    """Set processor fields that LLaVA's processors require and checkpoints from before 2025 lack, from config.json."""
    if not hasattr(processor, "num_additional_image_tokens"):
        return
    path = folder / "processor_config.json"
    named = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    needed: dict[str, Callable[[], Any]] = {
        "patch_size": lambda: model.vision_config.patch_size,
        "vision_feature_select_strategy": lambda: model.vision_feature_select_strategy,
        # The class token.
        "num_additional_image_tokens": lambda: int(model.vision_config.model_type == "clip_vision_model"),
    }
    for name, value in needed.items():
        if named.get(name) is None:
            setattr(processor, name, value())


def _check_template(config: ModelConfig, family: type[LMMFamily], processor: Any) -> None:
    if getattr(processor, "chat_template", None) and config.template == "auto":
        _require_pictures(config, family, processor)
    refuse_vicuna(config, family)
    if family.supports_vicuna_template:
        return
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"model.path '{config.path}' has no chat template; a model of type '{family.kind}' needs one to mark "
            "images and turns. Put the checkpoint's chat_template.jinja beside it."
        )


def refuse_vicuna(config: ModelConfig, family: type[LMMFamily]) -> None:
    """Raise UserError where `model.template` is vicuna_v1 for a family that marks images and turns in its own way."""
    if config.template == "vicuna_v1" and not family.supports_vicuna_template:
        raise UserError(
            f"model.template is vicuna_v1, but '{config.path}' is of type '{family.kind}', which marks images and "
            "turns in its own way. Set model.template to auto."
        )


def _require_pictures(config: ModelConfig, family: type[LMMFamily], processor: Any) -> None:
    """Raise UserError for a text-only chat template, which would drop the image."""
    asked = "Is it there?"
    parts = [{"type": "image"}, {"type": "text", "text": asked}]
    tokenizer = processor.tokenizer
    image = getattr(tokenizer, "image_token", None) or processor.image_token
    if tokenizer.convert_tokens_to_ids(processor.image_token) in (None, tokenizer.unk_token_id):
        return  # the tokenizer lacks the image token, which `check` reports
    try:
        plain, pictured = (
            processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
            for content in (parts[1:], parts)
        )
        inputs = processor(images=Image.new("RGB", (32, 32)), text=pictured, return_tensors="pt")
        placed = tokenizer.convert_tokens_to_ids(image) in inputs["input_ids"][0].tolist()
    # A template is a program in the checkpoint: it and the processor may raise anything.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        found = f"it fails with {type(error).__name__}: {reason}"
    else:
        if placed and asked in plain and "'type'" not in plain + pictured:
            return
        found = f"it makes {plain.strip()[:80]!r} of a question"
    otherwise = (
        "set model.template to vicuna_v1 if the model is a LLaVA-1.5, or " if family.supports_vicuna_template else ""
    )
    raise UserError(
        f"model.path: the chat template of '{config.path}' does not place pictures and text ({found}); expected a "
        f"multimodal one, whose turns are lists of parts. To use the checkpoint {otherwise}copy the "
        "chat_template.jinja of a multimodal checkpoint of the same type into its folder."
    )


def check_image_size(config: ModelConfig, model: Any, processor: Any) -> None:
    """Raise UserError when the processor makes images of another size than the vision tower of `model` takes."""
    expected = getattr(getattr(model, "vision_config", None), "image_size", None)
    if expected is None:
        return
    sides = [expected, expected] if isinstance(expected, int) else list(expected)
    pixels = processor.image_processor(Image.new("RGB", (32, 32)), return_tensors="pt")["pixel_values"]
    found = list(pixels.shape[-2:])
    if found != sides:
        raise UserError(
            f"The image processor of '{config.path}' makes images of {found[0]}x{found[1]} pixels, its vision tower "
            f"takes {sides[0]}x{sides[1]}. Correct preprocessor_config.json or processor_config.json in its folder."
        )
