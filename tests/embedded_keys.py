"""Routing keys of the embedded tasks, drawn and encoded in memory: no shards are prepared."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from data_prep.nano import CHECKPOINTS
from data_prep.nano.tasks import draw_items
from pipeline.backbones.clip import KeyEncoder
from pipeline.data.keys import Keys
from pipeline.prompts.routers import Router, States
from pipeline.prompts.routers.kept_keys import kept_sample

# What a user adds who asks about Count's pictures in one wording of their own (docs/own_data.md).
COUNT_CASE = "how many things are in this picture?"


@cache
def encoder() -> KeyEncoder:
    """The CLIP that ships with the project."""
    return KeyEncoder(CHECKPOINTS / "clip", device="cpu")


def embedded_keys(task: str, split: str, count: int, question: str | None = None) -> Keys:
    """The keys of the first samples of an embedded task, as prepared ones are; with `question` in place of its own."""
    items = list(draw_items(task, split, count, seed=0))
    texts = [question or item.question for item in items]
    pictures = [item.scene.image for item in items]
    known = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    text = encoder().text(list(known))[[known[text] for text in texts]]
    image = _encoded(pictures)
    return Keys(image.half(), text.half(), torch.ones(count, dtype=torch.bool), encoder().identity())


_ENCODED: dict[bytes, Tensor] = {}  # tasks share their pictures


def _encoded(pictures: Iterable[npt.NDArray[np.uint8]]) -> Tensor:
    named = [(picture.tobytes(), picture) for picture in pictures]
    new = {name: Image.fromarray(picture) for name, picture in named if name not in _ENCODED}
    if new:
        _ENCODED.update(zip(new, encoder().image(list(new.values())), strict=True))
    return torch.stack([_ENCODED[name] for name, _ in named])


def states_of(router: Router, tasks: Iterable[Keys]) -> States:
    """The states of tasks with these training keys."""
    return States([{**router.observe(keys), **kept_sample(keys)} for keys in tasks])


def right_first(router: Router, train: list[Keys], test: list[Keys]) -> list[float]:
    """Percent of each task's test samples whose best score is their own task's."""
    states = states_of(router, train)
    return [
        100.0 * float((router.scores(keys, states).argmax(1) == number).double().mean())
        for number, keys in enumerate(test)
    ]
