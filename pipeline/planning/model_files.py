"""A recipe's model without its weights: configuration, processor, and lengths of samples.

The memory plan needs them before a run, and `check` before anything is fetched.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from transformers import AutoConfig

from pipeline.backbones.lmm import load_processor
from pipeline.backbones.lmm_families import family_of
from pipeline.backbones.lmm_processor import source_of
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.data.conversation import Conversation
from pipeline.data.example import Example
from pipeline.data.image_sizes import ImageShape, image_sizes, know_image_sizes, limit_image_tokens
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.hub import repository as hub
from pipeline.hub.known_models import known_config, known_processor, known_settings
from pipeline.hub.pickled import is_converted, with_safetensors
from pipeline.hub.snapshots import settings_folder
from pipeline.hub.weights import weights_of
from pipeline.planning.memory_plan import ASSUMED_ANSWER, ASSUMED_TEXT
from pipeline.planning.model_shape import meta_model
from pipeline.planning.plan import Tokens

# Checkpoints of the shipped recipes that are neither on the Hub nor in the repository, and what makes them.
ASSEMBLED = {"models/small": "make small"}
PROBE_SIZE = (640, 480)  # width and height of a typical photograph in CoIN


class ModelFiles:
    """A recipe's model without its weights; every property raises UserError when its files are missing or invalid.

    Args:
        settings: the recipe's section model.
        online: whether the Hub may be asked for files that are not here.
        cuts: whether questions that are too long are cut, see `DataConfig.cuts`.
    """

    def __init__(self, settings: ModelConfig, online: bool, cuts: bool) -> None:
        self.settings, self.online, self.cuts = settings, online, cuts

    @cached_property
    def folder(self) -> Path:
        """The checkpoint's folder: the local one, or that of a Hub repository's files other than weights."""
        if self.online and hub.is_repository(self.settings.location):
            return settings_folder(source_of(self.settings))
        found = hub.local_folder(self.settings.location, self.settings.revision)
        if found is None:
            raise UserError(not_here("model.path", self.settings.path, self.settings.revision))
        return found

    @cached_property
    def loadable(self) -> Path | None:
        """The folder that a run would load from; None where weights have to be fetched or converted first."""
        weights = weights_of(self.folder)
        if weights.missing or (weights.pickled and not is_converted(self.folder)):
            return None
        return with_safetensors(self.folder)

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        folder = self.folder
        if not (folder / "config.json").is_file():
            raise UserError(f"model.path: {folder} has no config.json; expected a checkpoint in Hugging Face format.")
        try:
            return AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"model.path: the config.json of '{self.settings.path}' is not of a model that transformers supports "
                f"({first}). Expected an image-text-to-text checkpoint."
            ) from error

    @cached_property
    def shipped(self) -> bool:
        """Whether there is no configuration but the numbers that ship with the project, see `known_models`."""
        try:
            return self.config is None
        except UserError:
            return known_settings(self.settings.path) is not None

    @cached_property
    def planned(self) -> Any:
        """The configuration to plan with: the model's own, else the shipped one; UserError where there is neither."""
        return known_config(self.settings.path) if self.shipped else self.config

    @cached_property
    def built(self) -> nn.Module:
        """The model on the meta device, by `planned`; raises as `meta_model`."""
        return meta_model(self.settings, self.planned)

    @cached_property
    def processor(self) -> Any:
        """The model's processor."""
        assert self.config is not None
        return load_processor(self.settings)

    @cached_property
    def conversation(self) -> Conversation:
        """Turns samples into tokens for this model."""
        settings = self.settings
        return Conversation(self.processor, settings.max_length, settings.template, settings.image_padding, self.cuts)

    @cached_property
    def image_tokens(self) -> int:
        """Number of tokens of a photograph of typical size, without regard to model.max_length."""
        settings = self.settings
        unlimited = Conversation(self.processor, sys.maxsize, settings.template, settings.image_padding)
        buffer = io.BytesIO()
        Image.new("RGB", PROBE_SIZE).save(buffer, format="PNG")
        probe = unlimited.example(Sample("probe", buffer.getvalue(), "What is shown?", "Nothing."))
        return probe.prompt.count(self.config.image_token_id)

    def tokens(self, samples: list[Sample]) -> Tokens:
        """Lengths of the longest of these samples; without any, of a typical photograph with an assumed question."""
        examples = []
        for sample in samples:
            with contextlib.suppress(UserError):  # a sample that does not fit is reported with the data
                examples.append(self.conversation.example(sample))
        if examples:
            longest = max(examples, key=lambda example: len(example.prompt) + len(example.answer))
            image = longest.prompt.count(self.config.image_token_id)
            crops, patches, values = _most_of_images(examples)
            text = len(longest.prompt) - image
            return Tokens(image, text, len(longest.answer), "the longest sample read", crops, patches, values)
        image, shape = self.image_tokens, self.conversation.image_shape(*PROBE_SIZE)
        source = f"{image} per image, the rest assumed"
        return Tokens(image, ASSUMED_TEXT, ASSUMED_ANSWER, source, shape.crops, shape.tower_tokens, shape.values)

    def assumed_tokens(self, samples: Sequence[Sample] = ()) -> Tokens:
        """Lengths for a model without a usable processor: of its largest image by the shipped settings, if it has any.

        Raises UserError where images cannot be limited to `model.image_tokens`.
        """
        sizes = list(picture_sizes(samples))
        shape = self.shipped_shape(sizes or [PROBE_SIZE])
        if shape is None:
            image = getattr(self.planned, "image_seq_length", None) or 0
            return Tokens(image, ASSUMED_TEXT, ASSUMED_ANSWER, "assumed")
        source = f"{shape.tokens} per image, the rest assumed"
        return Tokens(shape.tokens, ASSUMED_TEXT, ASSUMED_ANSWER, source, shape.crops, shape.tower_tokens, shape.values)

    def shipped_shape(self, sizes: Sequence[tuple[int, int]]) -> ImageShape | None:
        """What the processor makes of the largest of these images (width, height), by its shipped settings.

        None for a model without any; UserError where images cannot be limited to `model.image_tokens`.
        """
        processor = known_processor(self.settings.path)
        if processor is None:
            return None
        know_image_sizes(processor, family_of(self.planned.model_type).sizes)
        limit_image_tokens(processor, self.settings.image_tokens)
        if self.settings.image_padding == "square":
            sizes = [(max(size), max(size)) for size in sizes]
        shapes = []
        for size in sizes:
            with contextlib.suppress(ValueError):  # a size that the processor refuses
                shapes.append(image_sizes(processor).of(*size))
        return max(shapes, key=lambda shape: shape.tokens, default=image_sizes(processor).of(*PROBE_SIZE))


def picture_sizes(samples: Sequence[Sample]) -> Iterator[tuple[int, int]]:
    """Width and height of the samples' images."""
    for sample in samples:
        with contextlib.suppress(Exception):  # Pillow raises many types for damaged files, which the data's check names
            picture = sample.picture()
            if picture is not None:
                yield picture.size


def _most_of_images(examples: list[Example]) -> tuple[int, int, int]:
    """The largest numbers of crops, patches and pixel values of any example's image."""
    pixels = [example.images["pixel_values"] for example in examples if example.images is not None]
    crops = max((len(image) for image in pixels if image.dim() == 4), default=1)
    patches = max((len(image) for image in pixels if image.dim() == 2), default=0)
    return crops, patches, max((image.numel() for image in pixels), default=0)


def clip_key_width(keys: KeysConfig) -> int | None:
    """Width of the keys, from the configuration of their model; None where that is not available."""
    folder = hub.local_folder(keys.location, keys.revision)
    try:
        settings = json.loads(((folder or Path()) / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        settings = known_settings(keys.path) or {}
    towers = {"clip": (), "siglip": ("vision_config",), "own": ("vision_config", "text_config")}[keys.kind]
    widths = [settings.get(tower, {}).get("hidden_size") for tower in towers] or [settings.get("projection_dim")]
    return max(widths) if all(isinstance(width, int) for width in widths) else None


def not_here(field: str, path: str, revision: str | None) -> str:
    """The error for a checkpoint that is neither a folder nor in the cache, without access to the Hub."""
    if path in ASSEMBLED:
        return f"{field}: '{path}' is not here; run `{ASSEMBLED[path]}`, which assembles it."
    if not hub.is_repository(path):
        return f"{field}: there is no folder '{path}'; put the checkpoint there or set {field} to its folder."
    at = f" --revision {revision}" if revision else ""
    return (
        f"{field}: '{path}' is not on this machine and https://huggingface.co cannot be reached from it (or "
        f"HF_HUB_OFFLINE is set); run `hf download {path}{at}` where it can be, with the cache (HF_HOME) on a disk "
        f"that this machine sees, or copy the checkpoint here and set {field} to its folder."
    )
