"""Prompt-only checkpoints: what one method learned on one dataset with one seed, whole or not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.checkpoint import COMPLETE, META, TENSORS
from pipeline.clip.backbone import Backbone
from pipeline.clip.methods import METHODS, PromptLearner, learner_of_sizes
from pipeline.clip.model import PromptedCLIP
from pipeline.clip.text import Words
from pipeline.errors import UserError
from pipeline.files import sha256

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LearnedPrompts:
    """The trainables of a finished unit in float32 by name, and the JSON beside them."""

    values: dict[str, Tensor]
    meta: dict[str, Any]


def unfinished(folder: Path) -> Path:
    """Where a unit is while it is trained, emptied of what an earlier attempt left."""
    work = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def save_prompts(folder: Path, values: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Complete a unit's unfinished folder and give it its name."""
    work = folder.with_name(folder.name + ".unfinished")
    save_file({name: value.float().contiguous() for name, value in values.items()}, work / TENSORS)
    meta = {"format": FORMAT_VERSION, **meta, "sha256": sha256(work / TENSORS)}
    (work / META).write_text(json.dumps(meta, indent=2, ensure_ascii=False) + "\n", "utf-8")
    (work / COMPLETE).write_text(sha256(work / META) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one that was refused
    work.rename(folder)


def load_prompts(folder: Path) -> LearnedPrompts | None:
    """What a finished unit learned, None when it is not finished; UserError when it is damaged."""
    if not (folder / COMPLETE).is_file():
        return None
    fix = f"Remove the folder {folder} to train it again, or restore it."
    try:
        meta = json.loads((folder / META).read_text("utf-8"))
        if meta["format"] != FORMAT_VERSION:
            raise UserError(f"{folder} has checkpoint format {meta['format']}, expected {FORMAT_VERSION}. {fix}")
        if sha256(folder / TENSORS) != meta["sha256"]:
            raise UserError(f"{folder / TENSORS} is not the file that {META} describes (its sha256). {fix}")
        with safe_open(str(folder / TENSORS), framework="pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read ({type(error).__name__}: {error}). {fix}") from error
    return LearnedPrompts(values, meta)


def learner_from(learned: LearnedPrompts, backbone: Backbone) -> PromptLearner:
    """The learner that a checkpoint holds, for a backbone of the sizes it was learned on; UserError for another one."""
    meta = learned.meta
    if meta["method"] not in METHODS:
        raise UserError(f"The checkpoint is of the method '{meta['method']}', which this version does not know.")
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
