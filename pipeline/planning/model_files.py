"""A recipe's model without its weights: configuration, processor, and lengths of samples.

The memory plan needs them before a run, and `check` before anything is fetched.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig

from pipeline.backbones.lmm import load_processor
from pipeline.backbones.lmm_processor import source_of
from pipeline.config.models import KeysConfig, ModelConfig
from pipeline.data.conversation import Conversation
from pipeline.data.example import Example
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.hub import repository as hub
from pipeline.hub.known_models import known_config, known_settings
from pipeline.hub.pickled import is_converted, with_safetensors
from pipeline.hub.snapshots import settings_folder
from pipeline.hub.weights import weights_of
from pipeline.planning.memory_plan import ASSUMED_ANSWER, ASSUMED_TEXT
from pipeline.planning.plan import Tokens

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

    def known(self) -> Any:
        """The built-in configuration of a well-known model; OSError for others."""
        self.config = known_config(self.settings.path)
        return self.config

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

    def assumed_tokens(self) -> Tokens:
        """Lengths from config.json only, for a model without a usable processor."""
        image = getattr(self.config, "image_seq_length", None) or 0
        return Tokens(image, ASSUMED_TEXT, ASSUMED_ANSWER, "assumed")


def _most_of_images(examples: list[Example]) -> tuple[int, int, int]:
    """The largest numbers of crops, patches and pixel values of any example's image."""
    pixels = [example.images["pixel_values"] for example in examples if example.images is not None]
    crops = max((len(image) for image in pixels if image.dim() == 4), default=1)
    patches = max((len(image) for image in pixels if image.dim() == 2), default=0)
    return crops, patches, max((image.numel() for image in pixels), default=0)


def clip_key_width(keys: KeysConfig) -> int | None:
    """Width of a CLIP's keys, from its configuration; None where that is not available."""
    folder = hub.local_folder(keys.location, keys.revision)
    try:
        return int(json.loads(((folder or Path()) / "config.json").read_text("utf-8"))["projection_dim"])
    except (OSError, ValueError, KeyError, TypeError):
        return (known_settings(keys.path) or {}).get("projection_dim")


def not_here(field: str, path: str, revision: str | None) -> str:
    """The error for a checkpoint that is neither a folder nor in the cache, without access to the Hub."""
    if not hub.is_repository(path):
        return f"{field}: there is no folder '{path}'; put the checkpoint there or set {field} to its folder."
    at = f" --revision {revision}" if revision else ""
    return (
        f"{field}: '{path}' is not on this machine and https://huggingface.co cannot be reached from it (or "
        f"HF_HUB_OFFLINE is set); run `hf download {path}{at}` where it can be, with the cache (HF_HOME) on a disk "
        f"that this machine sees, or copy the checkpoint here and set {field} to its folder."
    )
