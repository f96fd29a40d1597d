"""What `check` says about a benchmark's backbone, and about what each method learns on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline import hub
from pipeline.check_model import safe_weights
from pipeline.clip.backbone import Sizes
from pipeline.clip.methods import learner_of_sizes
from pipeline.clip.recipe import ClipMethodConfig, ClipRecipe
from pipeline.clip.text import Words
from pipeline.errors import UserError, UserErrors


def check_backbone(recipe: ClipRecipe, online: bool) -> str:
    """The backbone, and the number of parameters that each method learns on it.

    Raises UserError when it cannot be had here or is of another kind, and UserErrors, one sentence for each method that
    does not fit it: a schedule it has too few blocks for, or words with fewer tokens than there are vectors.
    """
    from transformers import AutoConfig

    model = recipe.model
    folder = _folder(recipe, online)
    try:
        config = AutoConfig.from_pretrained(folder or model.location, revision=model.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"'{model.path}' has no readable config.json of a model: {error}") from error
    sizes = Sizes.of(config)
    if folder is not None and not online and hub.missing_weights(folder):
        raise UserError(
            f"model.path: {folder} lacks its weights ({', '.join(hub.missing_weights(folder))}); fetch them with "
            f"`hf download {model.path}`, or set model.path to a complete folder."
        )
    words = _words(recipe, folder, config)
    learned, wrong = [], []
    for method in recipe.methods:
        try:
            count = _learned(method, sizes, words)
        except UserError as error:
            wrong.append(f"methods.{method.name}: {error}")
            continue
        learned.append(f"{method.name} {count:,}" + " per class" * method.per_class)
    if wrong:
        raise UserErrors(wrong)
    return f"{model.path}: {config.model_type}, {model.dtype}; learned parameters: {', '.join(learned)}"


def _folder(recipe: ClipRecipe, online: bool) -> Path | None:
    """The checkpoint's folder; None when it is still on the Hub, which can be reached and has weights to load."""
    model = recipe.model
    folder = hub.local_folder(model.location, model.revision)
    on_the_hub = online and hub.is_repository(model.location)
    if folder is None and not on_the_hub:
        revision = f" --revision {model.revision}" if model.revision else ""
        raise UserError(
            f"model.path: '{model.path}' is not on this machine; run `hf download {model.path}{revision}` where the "
            "Hugging Face Hub can be reached, or set model.path to the folder of a CLIP or SigLIP."
            + (safe_weights("model") if hub.is_repository(model.location) else "")
        )
    lacking = folder is None or bool(hub.missing_weights(folder))
    if on_the_hub and lacking and not hub.offers_safetensors(model.location, model.revision):
        raise UserError(f"model.path: '{model.path}' has only pickled weights on the Hub." + safe_weights("model"))
    return folder


def _words(recipe: ClipRecipe, folder: Path | None, config: Any) -> Words:
    from transformers import AutoTokenizer

    model = recipe.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder or model.location, revision=model.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: '{model.path}' has no tokenizer that can be read: {error}") from error
    return Words(tokenizer, config.text_config.max_position_embeddings)


def _learned(method: ClipMethodConfig, sizes: Sizes, words: Words) -> int:
    """The number of parameters that a method learns; UserError when it does not fit the backbone."""
    options = method.options | ({"classes": 1} if method.per_class else {})
    with torch.device("meta"):
        learner = learner_of_sizes(method.kind, sizes, 0, **options)
    start = learner.start_words()
    if start is not None:
        words.first_ids(start, learner.length)
    return sum(parameter.numel() for parameter in learner.parameters())
