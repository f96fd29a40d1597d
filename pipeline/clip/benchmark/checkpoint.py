"""Checkpoints of finished units: the trainables of one method, dataset and seed, written atomically."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.clip.learning.descriptions import Descriptions
from pipeline.clip.learning.model import PromptedCLIP
from pipeline.clip.methods import PromptLearner, learner_of_sizes
from pipeline.clip.towers.backbone import Backbone
from pipeline.clip.towers.text import Words
from pipeline.config import registry
from pipeline.errors import UserError
from pipeline.runs.finished import finish_folder, read_finished
from pipeline.runs.layout import COMPLETE, unfinished


@dataclass(frozen=True)
class LearnedPrompts:
    """The trainables of a finished unit by name, in float32, and its meta.json."""

    values: dict[str, Tensor]
    meta: dict[str, Any]


def save_prompts(folder: Path, values: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write a unit's trainables and meta.json into its unfinished folder, then rename it to `folder`."""
    finish_folder(unfinished(folder), folder, {name: value.float() for name, value in values.items()}, meta)


def load_prompts(folder: Path) -> LearnedPrompts | None:
    """The checkpoint of a finished unit; None when it is not finished, UserError when it is damaged."""
    found = read_finished(folder, f"Remove the folder {folder} to train it again, or restore it.")
    return None if found is None else LearnedPrompts(*found)


def learner_from(learned: LearnedPrompts, backbone: Backbone) -> PromptLearner:
    """The learner with a checkpoint's values; UserError when it was trained on a backbone of other sizes."""
    meta = learned.meta
    # Only registered names: `registry.load` would import any module that a checkpoint names.
    if meta["method"] not in registry.names("clip_methods"):
        raise UserError(
            f"The checkpoint is of the method '{meta['method']}', which this version does not know; "
            + registry.provide("clip_methods", meta["method"])
        )
    learner = learner_of_sizes(meta["method"], backbone.sizes, 0, **meta["options"])
    expected = {name: tuple(value.shape) for name, value in learner.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in learned.values.items()}
    if found != expected:
        other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise UserError(
            f"The checkpoint's '{other[0]}' has the shape {found.get(other[0])}, this backbone needs "
            f"{expected.get(other[0])}: it was learned on {meta.get('model', 'another model')}. Give that model."
        )
    learner.load_state_dict(learned.values)
    learner.template = meta.get("template", learner.template)
    return learner


def classifier_from(folder: Path, backbone: Backbone, words: Words, names: Sequence[str]) -> PromptedCLIP:
    """The classifier over the class names `names` with the prompts in a finished unit's folder.

    Raises UserError when the folder is no finished unit, the backbone has other sizes, or class-specific contexts were
    learned for another number of classes.
    """
    learned = load_prompts(folder)
    if learned is None:
        raise UserError(f"{folder} holds no finished prompts ({COMPLETE} is missing). Name a finished unit's folder.")
    return classifier_of(learned, backbone, words, names)


def classifier_of(learned: LearnedPrompts, backbone: Backbone, words: Words, names: Sequence[str]) -> PromptedCLIP:
    """The classifier over the class names `names` with a checkpoint's prompts; UserError as `classifier_from`."""
    described = learned.meta.get("described")
    descriptions = None if described is None else Descriptions.from_json(described)
    return PromptedCLIP(backbone, learner_from(learned, backbone), words, names, descriptions=descriptions)
