"""Prompt-only checkpoints: what one method learned on one dataset with one seed, whole or not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

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
    """The trainables of a finished unit in float32 by name, and the JSON beside them."""

    values: dict[str, Tensor]
    meta: dict[str, Any]


def save_prompts(folder: Path, values: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Complete a unit's unfinished folder and give it its name."""
    finish_folder(unfinished(folder), folder, values, meta)


def load_prompts(folder: Path) -> LearnedPrompts | None:
    """What a finished unit learned, None when it is not finished; UserError when it is damaged."""
    found = read_finished(folder, f"Remove the folder {folder} to train it again, or restore it.")
    return None if found is None else LearnedPrompts(*found)


def learner_from(learned: LearnedPrompts, backbone: Backbone) -> PromptLearner:
    """The learner that a checkpoint holds, for a backbone of the sizes it was learned on; UserError for another one."""
    meta = learned.meta
    if meta["method"] not in registry.names("clip_methods"):  # nothing is imported because a file says so
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
    """What a unit learned, as a classifier among any class names.

    Raises UserError when the folder is no finished unit, the backbone is another one, or a context per class was
    learned for another number of classes.
    """
    learned = load_prompts(folder)
    if learned is None:
        raise UserError(f"{folder} holds no finished prompts ({COMPLETE} is missing). Name a finished unit's folder.")
    return PromptedCLIP(backbone, learner_from(learned, backbone), words, names)
