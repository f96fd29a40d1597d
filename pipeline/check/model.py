"""Checks of the frozen model and the CLIP: availability, completeness, and consistency of their parts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.backbones.attentions import require_kernel
from pipeline.backbones.clip import key_identity
from pipeline.backbones.lmm_families import known_families
from pipeline.backbones.lmm_processor import check_image_size
from pipeline.backbones.lmm_weights import refuse_quantised_twice, require_fitting_weights
from pipeline.config.models import KeysConfig
from pipeline.errors import UserError, UserErrors
from pipeline.hub import repository as hub
from pipeline.hub.pickled import is_converted
from pipeline.hub.weights import lacking, weights_of
from pipeline.planning.frozen_models import emulated
from pipeline.planning.model_files import ModelFiles, not_here


def check_model(model: ModelFiles, here: bool = True) -> str:
    """Check checkpoint, tokenizer and vision tower; raises UserErrors with all problems.

    `here` says whether the run will be on this machine, whose support of the precision is then told.
    """
    settings, wrong, gpu = model.settings, list[str](), here and torch.cuda.is_available()
    try:
        weights = weights_words(model)
    except UserErrors as errors:
        wrong += errors.sentences
    config = model.config
    for refuse in (partial(refuse_quantised_twice, settings, config), partial(require_kernel, settings, gpu)):
        try:
            refuse()
        except UserError as error:
            wrong.append(str(error))
    supported = known_families()
    if config.model_type not in supported:
        wrong.append(
            f"model.path: '{settings.path}' is of type {config.model_type}; supported are {', '.join(supported)}. "
            "Set it to a checkpoint of one of these."
        )
        raise UserErrors(wrong)
    wrong += special_token_problems(model.processor, config, settings.path)
    wrong += vision_problems(model)
    if not wrong:
        wrong += image_token_problems(model)
    if not wrong and model.loadable is not None:
        require_fitting_weights(settings, model.loadable)
    if wrong:
        raise UserErrors(wrong)
    stored = str(getattr(config, "dtype", None) or "unknown precision").removeprefix("torch.")
    cast = "" if stored in (settings.dtype, "unknown precision") else f" (stored in {stored})"
    quantised = "" if settings.quantization == "none" else f", decoder in {settings.quantization}"
    return (
        f"{settings.path}: {config.model_type}, {type(model.processor).__name__}, "
        f"{len(model.processor.tokenizer)} tokens, {settings.dtype}{cast}{quantised}, {weights}"
        + (f"; {note}" if (note := emulated(settings.dtype) if here else "") else "")
    )


def weights_words(model: ModelFiles) -> str:
    """Where the weights are, and whether they are fetched or converted, in words; UserErrors when unavailable."""
    settings, weights = model.settings, weights_of(model.folder)
    once = ".bin files, converted once into safetensors by the first run"
    if weights.whole:
        return "weights here" if not weights.pickled or model.loadable is not None else f"weights here as {once}"
    if not (model.online and hub.is_repository(settings.location)):
        raise UserErrors([_incomplete(settings.path, model.folder, weights.missing)])
    offer = hub.offered_weights(settings.location, settings.revision)
    if offer == "none":
        raise UserErrors([f"model.path: '{settings.path}' has no weights on the Hub, neither safetensors nor .bin."])
    form = f" as {once}" if offer == "pickled" else ""
    return f"weights on the Hub{form}, fetched by the first run"


def special_token_problems(processor: Any, config: Any, path: str) -> list[str]:
    """Problems with the image, end or padding token: missing in the tokenizer or in the model."""
    tokenizer, wrong = processor.tokenizer, []
    rows = getattr(config.get_text_config(), "vocab_size", None)
    # Where they differ, the processor's token marks an image in the text, the tokenizer's one feature of it.
    image = getattr(tokenizer, "image_token", None) or getattr(processor, "image_token", None)
    wanted = getattr(config, "image_token_id", None)
    number = None if image is None else tokenizer.convert_tokens_to_ids(image)
    if image is None:
        wrong.append(f"model.path: the processor of '{path}' names no image token; set image_token beside the model.")
    elif number is None or (number == tokenizer.unk_token_id and image != tokenizer.unk_token):
        wrong.append(
            f"model.path: the tokenizer of '{path}' does not know the image token {image!r}; "
            "add it to the tokenizer as a special token."
        )
    elif number != wanted:
        wrong.append(
            f"model.path: in '{path}' the image token {image!r} is number {number} for the tokenizer and {wanted} for "
            "the model (image_token_id in config.json); give tokenizer and config.json of the same checkpoint."
        )
    elif rows and number >= rows:
        wrong.append(
            f"model.path: in '{path}' the image token {image!r} has number {number}, and the model's vocabulary ends "
            f"at {rows - 1}; give a checkpoint whose embedding was resized for it."
        )
    for kind, found in (("end", tokenizer.eos_token_id), ("padding", tokenizer.pad_token_id)):
        if found is None and kind == "end":  # without a padding token the end token pads, which is masked
            wrong.append(
                f"model.path: the tokenizer of '{path}' has no {kind} token (eos_token), so answers never end."
            )
        elif found is not None and rows and found >= rows:
            wrong.append(
                f"model.path: in '{path}' the {kind} token has number {found}, and the model's vocabulary ends at "
                f"{rows - 1}; give tokenizer and weights of the same checkpoint."
            )
    return wrong


def vision_problems(model: ModelFiles) -> list[str]:
    """The problem, if any, that the processor makes images of another size than the vision tower takes."""
    try:
        check_image_size(model.settings, model.config, model.processor)
    except UserError as error:
        return [str(error)]
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        return [f"model.path: the image processor of '{model.settings.path}' fails on a plain image ({error})."]
    return []


def image_token_problems(model: ModelFiles) -> list[str]:
    """The problem, if any, that the processor of a LLaVA or FastVLM writes more or fewer image tokens than features."""
    config = model.config
    tower = config.vision_config
    # The others compute the number from the image in processor and model; a tower of timm does not tell its patches.
    if config.model_type not in ("llava", "fast_vlm") or not getattr(tower, "patch_size", None):
        return []
    class_token = config.model_type == "llava" and config.vision_feature_select_strategy == "full"
    wanted = (tower.image_size // tower.patch_size) ** 2 + class_token
    try:
        found = model.image_tokens
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        return [f"model.path: the processor of '{model.settings.path}' fails on a plain image ({error})."]
    if found == wanted:
        return []
    return [
        f"model.path: the processor of '{model.settings.path}' writes {found} image tokens and the model has {wanted} "
        "features for an image; patch_size, num_additional_image_tokens and vision_feature_select_strategy in "
        "processor_config.json must fit config.json."
    ]


def check_keys(keys: KeysConfig, online: bool) -> tuple[str, dict[str, str] | None]:
    """Check the CLIP; returns a description, and its identity, None where it is not fetched or converted yet."""
    folder = hub.local_folder(keys.location, keys.revision)
    on_the_hub = online and hub.is_repository(keys.location)
    if folder is None and not on_the_hub:
        raise UserError(not_here("keys.path", keys.path, keys.revision))
    weights = weights_of(folder) if folder is not None else None
    if weights is None or weights.missing:
        if not on_the_hub:
            assert weights is not None
            raise UserError(f"keys.path: {lacking(Path(str(folder)), weights.missing)}")
        offer = hub.offered_weights(keys.location, keys.revision)
        if offer == "none":
            raise UserError(f"keys.path: '{keys.path}' has no weights on the Hub, neither safetensors nor .bin.")
        once = " as .bin files, converted once into safetensors" if offer == "pickled" else ""
        return f"{keys.path}: on the Hub{once}, fetched by `prepare`", None
    assert folder is not None
    if weights.pickled and not is_converted(folder):
        return f"{keys.path}: .bin files, converted once into safetensors by `prepare`", None
    identity = key_identity(*keys.source)
    return f"{keys.path}: weights {identity['weights_sha256'][:12]}, {keys.text_feature} text", identity


def _incomplete(path: str, folder: Path, missing: list[str]) -> str:
    listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    fetch = f"run `hf download {path}` where the Hub can be reached" if hub.is_repository(path) else "copy them there"
    return f"model.path: the checkpoint in {folder} lacks weights ({listed}); {fetch}."
