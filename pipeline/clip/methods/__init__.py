"""Prompt methods on CLIP, one file each: their classes by name, and functions that check options and make learners."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, ValidationError, create_model

from pipeline.clip.methods.base import PromptLearner
from pipeline.clip.towers.backbone import Backbone, Sizes
from pipeline.clip.towers.text import Words
from pipeline.config import registry
from pipeline.config.messages import sentence
from pipeline.errors import UserError, nearest

__all__ = ["PromptLearner", "learner_of_sizes", "make_learner", "method_class", "refuse_options"]


def method_class(name: str) -> type[PromptLearner]:
    """The class of a method; UserError for an unknown name."""
    found: type[PromptLearner] = registry.load("clip_methods", name)
    return found


def refuse_options(name: str, options: Mapping[str, Any], hidden: tuple[str, ...] = ()) -> None:
    """Raise UserError for an option that the method does not have or that is `hidden`, or a value of a wrong type."""
    method = method_class(name)
    parameters = inspect.signature(method).parameters
    known = [option for option in parameters if option not in ("sizes", *hidden)]
    for option in options:
        if option not in known:
            raise UserError(
                f"The method {name} has no option '{option}'; it has {', '.join(known) or 'none'}."
                + nearest(option, known)
            )
    kinds = get_type_hints(method.__init__)
    fields: dict[str, Any] = {option: (kinds[option], parameters[option].default) for option in known}
    signature = create_model(name, __config__=ConfigDict(strict=True), **fields)
    try:
        signature.model_validate(dict(options))
    except ValidationError as error:
        raise UserError(f"The method {name} cannot take its options: {sentence(error, signature)}") from None


def learner_of_sizes(name: str, sizes: Sizes, /, seed: int = 0, **options: Any) -> PromptLearner:
    """The trainables of a method for a backbone of these sizes, initialised at random from `seed`.

    Raises UserError for an unknown method or option, and for an option's value of a wrong type.
    """
    refuse_options(name, options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return method_class(name)(sizes, **options)  # type: ignore[arg-type]


def make_learner(name: str, backbone: Backbone, words: Words, /, seed: int = 0, **options: Any) -> PromptLearner:
    """The trainables of a method for this backbone; contexts are initialised from words where the method has some."""
    learner = learner_of_sizes(name, backbone.sizes, seed, **options)
    start = learner.start_words()
    if start is not None and learner.length:
        learner.start_from(backbone.embedding_rows(words.first_ids(start, learner.length)))
    return learner
