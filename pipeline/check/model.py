"""The checks of the frozen model and of the CLIP: are they here, are they whole, do their parts fit each other."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.backbones.lmm import SUPPORTED, load_processor
from pipeline.backbones.lmm_processor import check_image_size, source_of
from pipeline.backbones.lmm_weights import require_fitting_weights
from pipeline.config.recipe import Recipe
from pipeline.data.conversation import Conversation, Example
from pipeline.data.sample import Sample
from pipeline.errors import UserError, UserErrors
from pipeline.hub import repository as hub
from pipeline.hub.known_models import known_config, known_settings
from pipeline.hub.pickled import is_converted, with_safetensors
from pipeline.hub.snapshots import settings_folder
from pipeline.hub.weights import lacking, weights_of
from pipeline.planning.frozen_models import emulated
from pipeline.planning.memory_plan import ASSUMED_ANSWER, ASSUMED_TEXT, Tokens

PROBE_SIZE = (640, 480)  # width and height of a usual photograph in CoIN


class CheckedModel:
    """The recipe's model as far as it is on this machine; every property raises UserError when it cannot be had."""

    def __init__(self, recipe: Recipe, online: bool) -> None:
        self.recipe = recipe
        self.settings = recipe.model
        self.online = online

    @cached_property
    def folder(self) -> Path:
        """The checkpoint's folder: what is here, and what a repository that can be reached says beside its weights."""
        if self.online and hub.is_repository(self.settings.location):
            return settings_folder(source_of(self.settings))
        found = hub.local_folder(self.settings.location, self.settings.revision)
        if found is None:
            raise UserError(not_here("model.path", self.settings.path, self.settings.revision))
        return found

    @cached_property
    def loadable(self) -> Path | None:
        """The folder that a run would load from; None while weights have to be fetched or converted first."""
        weights = weights_of(self.folder)
        if weights.missing or (weights.pickled and not is_converted(self.folder)):
            return None
        return with_safetensors(self.folder)

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig

        folder = self.folder
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {folder} has no config.json; expected a checkpoint in Hugging Face format.")
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"model.path: the config.json of '{self.settings.path}' is of no model that transformers knows "
                f"({first}). Give an image-text-to-text checkpoint."
            ) from error

    def known(self) -> Any:
        """The configuration of a model that the project knows the sizes of; OSError for others."""
        self.config = known_config(self.settings.path)
        return self.config

    @cached_property
    def processor(self) -> Any:
        """The model's processor."""
        assert self.config is not None
        return load_processor(self.settings)

    @cached_property
    def conversation(self) -> Conversation:
        """What turns a sample into the model's tokens."""
        settings = self.settings
        cuts = self.recipe.data.too_long == "truncate"
        return Conversation(self.processor, settings.max_length, settings.template, settings.image_padding, cuts)

    @cached_property
    def image_tokens(self) -> int:
        """Tokens of a photograph of a usual size, however long a sample may be."""
        settings = self.settings
        unlimited = Conversation(self.processor, sys.maxsize, settings.template, settings.image_padding)
        buffer = io.BytesIO()
        Image.new("RGB", PROBE_SIZE).save(buffer, format="PNG")
        probe = unlimited.example(Sample("probe", buffer.getvalue(), "What is shown?", "Nothing."))
        return probe.prompt.count(self.config.image_token_id)

    def tokens(self, samples: list[Sample]) -> Tokens:
        """Lengths of the longest of these samples, else of a photograph with a question of a usual length."""
        examples = []
        for sample in samples:
            with contextlib.suppress(UserError):  # a sample that does not fit is reported with the data
                examples.append(self.conversation.example(sample))
        if examples:
            longest = max(examples, key=lambda example: len(example.prompt) + len(example.answer))
            image = longest.prompt.count(self.config.image_token_id)
            crops, patches, values = _most_of_images(examples)
            text = len(longest.prompt) - image
            return Tokens(image, text, len(longest.answer), "the longest sample looked at", crops, patches, values)
        image, shape = self.image_tokens, self.conversation.image_shape(*PROBE_SIZE)
        source = f"{image} of an image, the others assumed"
        return Tokens(image, ASSUMED_TEXT, ASSUMED_ANSWER, source, shape.crops, shape.tower_tokens, shape.values)

    def assumed_tokens(self) -> Tokens:
        """Lengths by config.json alone, for a model whose processor cannot be used."""
        image = getattr(self.config, "image_seq_length", None) or 0
        return Tokens(image, ASSUMED_TEXT, ASSUMED_ANSWER, "assumed")


def _most_of_images(examples: list[Example]) -> tuple[int, int, int]:
    """The most crops, patches and numbers that any one example's image has."""
    pixels = [example.images["pixel_values"] for example in examples if example.images is not None]
    crops = max((len(image) for image in pixels if image.dim() == 4), default=1)
    patches = max((len(image) for image in pixels if image.dim() == 2), default=0)
    return crops, patches, max((image.numel() for image in pixels), default=0)


def check_model(model: CheckedModel) -> str:
    """Look at checkpoint, tokenizer and vision tower; raises UserErrors with everything that does not fit."""
    settings, wrong = model.settings, []
    try:
        weights = weights_words(model)
    except UserErrors as errors:
        wrong += errors.sentences
    config = model.config
    if config.model_type not in SUPPORTED:
        wrong.append(
            f"model.path: '{settings.path}' is of type {config.model_type}; supported are {', '.join(SUPPORTED)}. "
            "Give a checkpoint of one of these."
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
    return (
        f"{settings.path}: {config.model_type}, {type(model.processor).__name__}, "
        f"{len(model.processor.tokenizer)} tokens, {settings.dtype}{cast}, {weights}"
        + (f"; {note}" if (note := emulated(settings.dtype)) else "")
    )


def weights_words(model: CheckedModel) -> str:
    """Where the weights are and what becomes of them; UserErrors when they cannot be had."""
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
    """Sentences about an image, end or padding token that the tokenizer or the model does not know."""
    tokenizer, wrong = processor.tokenizer, []
    rows = getattr(config.get_text_config(), "vocab_size", None)
    # Where they differ, the processor's stands for an image in the text, the tokenizer's for one of its features.
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
        if found is None and kind == "end":  # a missing padding token is harmless: the end token pads, and is masked
            wrong.append(
                f"model.path: the tokenizer of '{path}' has no {kind} token (eos_token), so answers never end."
            )
        elif found is not None and rows and found >= rows:
            wrong.append(
                f"model.path: in '{path}' the {kind} token has number {found}, and the model's vocabulary ends at "
                f"{rows - 1}; give tokenizer and weights of the same checkpoint."
            )
    return wrong


def vision_problems(model: CheckedModel) -> list[str]:
    """A sentence when the processor makes images of another size than the vision tower was built for."""
    try:
        check_image_size(model.settings, model.config, model.processor)
    except UserError as error:
        return [str(error)]
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        return [f"model.path: the image processor of '{model.settings.path}' fails on a plain image ({error})."]
    return []


def image_token_problems(model: CheckedModel) -> list[str]:
    """A sentence when an image gets another number of tokens than the model of LLaVA's kind has features for it."""
    config = model.config
    if config.model_type != "llava":  # others compute the number from the image in both places
        return []
    tower = config.vision_config
    wanted = (tower.image_size // tower.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
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


def check_keys(recipe: Recipe, online: bool) -> tuple[str, dict[str, str] | None]:
    """Look at the CLIP; returns what was found and its identity, None while it is still on the Hub."""
    from pipeline.backbones.clip import key_identity

    keys = recipe.keys
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


def clip_key_width(recipe: Recipe) -> int | None:
    """Width of the keys the recipe's CLIP makes, by its configuration; None when that is not known here."""
    folder = hub.local_folder(recipe.keys.location, recipe.keys.revision)
    try:
        return int(json.loads(((folder or Path()) / "config.json").read_text("utf-8"))["projection_dim"])
    except (OSError, ValueError, KeyError, TypeError):
        return (known_settings(recipe.keys.path) or {}).get("projection_dim")


def not_here(field: str, path: str, revision: str | None) -> str:
    """The sentence about a checkpoint that is neither a folder nor in the cache, with the Hub out of reach."""
    if not hub.is_repository(path):
        return f"{field}: there is no folder '{path}'; put the checkpoint there or set {field} to its folder."
    at = f" --revision {revision}" if revision else ""
    return (
        f"{field}: '{path}' is not on this machine and https://huggingface.co cannot be reached from it (or "
        f"HF_HUB_OFFLINE is set); run `hf download {path}{at}` where it can be, with the cache (HF_HOME) on a disk "
        f"that this machine sees, or copy the checkpoint here and set {field} to its folder."
    )


def _incomplete(path: str, folder: Path, missing: list[str]) -> str:
    listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    fetch = f"run `hf download {path}` where the Hub can be reached" if hub.is_repository(path) else "copy them there"
    return f"model.path: the checkpoint in {folder} lacks weights ({listed}); {fetch}."
