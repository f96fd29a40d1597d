"""The check of a CLIP benchmark's backbone, and of the number of parameters that each method learns on it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from pipeline.clip.methods import learner_of_sizes
from pipeline.clip.recipe import ClipMethodConfig, ClipModelConfig, search_among
from pipeline.clip.recipe_search import SearchConfig
from pipeline.clip.towers.backbone import Sizes, backbone_source
from pipeline.clip.towers.text import Words
from pipeline.errors import UserError, UserErrors
from pipeline.hub import repository as hub
from pipeline.hub.snapshots import settings_folder
from pipeline.hub.weights import weights_of
from pipeline.planning.frozen_models import emulated


def check_backbone(model: ClipModelConfig, methods: Sequence[ClipMethodConfig], online: bool, here: bool = True) -> str:
    """Describe the backbone and the number of parameters that each method learns on it.

    `here` says whether the run will be on this machine, whose support of the precision is then told.

    Raises UserError when it is not available here or of another kind, and UserErrors with a sentence for each method
    that does not fit it: too few blocks for a schedule, or words with fewer tokens than context vectors.
    """
    folder = _folder(model, online)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"'{model.path}' has no readable config.json of a model: {error}") from error
    sizes = Sizes.of(config)
    weights = weights_of(folder)
    if weights.missing and not online:
        raise UserError(
            f"model.path: {folder} lacks its weights ({', '.join(weights.missing)}); fetch them with "
            f"`hf download {model.path}`, or set model.path to a complete folder."
        )
    once = weights.pickled
    if weights.missing:
        offer = hub.offered_weights(model.location, model.revision)
        once = offer == "pickled"
        if offer == "none":
            raise UserError(f"model.path: '{model.path}' has no weights on the Hub, neither safetensors nor .bin.")
    words = words_of(model, folder, config)
    learned, wrong = [], []
    for method in methods:
        try:
            count = _learned(method, search_among(methods, method), sizes, words)
        except UserError as error:
            wrong.append(f"methods.{method.name}: {error}")
            continue
        learned.append(f"{method.name} {count:,}" + " per class" * method.per_class)
    if wrong:
        raise UserErrors(wrong)
    slow = emulated(model.dtype) if here else ""
    return (
        f"{model.path}: {config.model_type}, {model.dtype}; learned parameters: {', '.join(learned)}"
        + ("; weights are .bin files, converted once into safetensors by the first run" if once else "")
        + (f"; {slow}" if slow else "")
    )


def _folder(model: ClipModelConfig, online: bool) -> Path:
    """The checkpoint's folder: the local one, or that of a Hub repository's files other than weights."""
    if online and hub.is_repository(model.location):
        return settings_folder(backbone_source(model.location, model.revision))
    folder = hub.local_folder(model.location, model.revision)
    if folder is None:
        revision = f" --revision {model.revision}" if model.revision else ""
        raise UserError(
            f"model.path: '{model.path}' is not on this machine; run `hf download {model.path}{revision}` where the "
            "Hugging Face Hub can be reached, or set model.path to the folder of a CLIP or SigLIP."
        )
    return folder


def words_of(model: ClipModelConfig, folder: Path, config: Any) -> Words:
    """The tokenizer of a checkpoint; UserError without one that can be read."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: '{model.path}' has no tokenizer that can be read: {error}") from error
    return Words(tokenizer, config.text_config.max_position_embeddings)


def _learned(method: ClipMethodConfig, search: SearchConfig | None, sizes: Sizes, words: Words) -> int:
    """The number of parameters that a method learns, at most; UserError when it does not fit the backbone."""
    options = method.options | ({"classes": 1} if method.per_class else {}) | ({} if search is None else search.longest)
    with torch.device("meta"):
        learner = learner_of_sizes(method.kind, sizes, 0, **options)
    start = learner.start_words()
    if start is not None:
        words.first_ids(start, learner.length)
    return sum(parameter.numel() for parameter in learner.parameters())
