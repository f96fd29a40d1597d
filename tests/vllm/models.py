"""The embedded model in a version that vLLM loads, and the questions of its tasks.

Answers of engines on it are compared with each other.
"""

from __future__ import annotations

import functools
import io
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from data_prep.nano import CHECKPOINTS
from data_prep.nano.tasks import draw_items
from pipeline.adapter.answering import Question
from tests.adapters import Models

EMBEDDED = CHECKPOINTS / "llava"
CLIP = CHECKPOINTS / "clip"
TASKS = ("Colours", "Digits", "Words", "Charts", "Count", "Boxes")


def save_loadable(folder: Path) -> Models:
    """Write a copy of the embedded LLaVA that vLLM 0.32 loads; the embedded CLIP is as it is.

    vLLM's Llama knows no other activation than SiLU, with which the copy's answers mean nothing; and it expects the
    names of a vision tower that published checkpoints have, which transformers 5 does not write.
    """
    llava = folder / "llava"
    shutil.copytree(EMBEDDED, llava)
    config = json.loads((llava / "config.json").read_text("utf-8"))
    config["text_config"]["hidden_act"] = "silu"
    (llava / "config.json").write_text(json.dumps(config), "utf-8")
    with safe_open(str(EMBEDDED / "model.safetensors"), framework="pt") as file:
        tensors = {_published(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    save_file(tensors, llava / "model.safetensors", metadata={"format": "pt"})
    return Models(llava, CLIP, config["text_config"]["hidden_size"])


def nano_questions(count: int) -> list[Question]:
    """Test questions of the embedded tasks, as many of each."""
    each = [_questions(task, "test", count // len(TASKS)) for task in TASKS]
    return [question for together in zip(*each, strict=True) for question in together]


def nano_question(number: int, variant: int = 0, with_image: bool = True) -> Question:
    """A training question of a task, as `tests.adapters.question`."""
    asked = _questions(TASKS[number], "train", variant + 1)[variant]
    return asked if with_image else Question(asked.text)


@functools.cache
def _questions(task: str, split: str, count: int) -> list[Question]:
    return [Question(item.question, _png(item.scene.image)) for item in draw_items(task, split, count, seed=0)]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _published(name: str) -> str:
    """A tensor's name as published checkpoints of LLaVA have it."""
    inside = name.removeprefix("vision_tower.")
    return name if inside == name else f"vision_tower.vision_model.{inside}"
