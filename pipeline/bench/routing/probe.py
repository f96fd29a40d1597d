"""The keys of the probe's tasks: pictures and questions are drawn from a seed and encoded by the embedded CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from data_prep.nano import CHECKPOINTS
from pipeline.backbones.clip import KeyEncoder
from pipeline.bench.routing.pictures import SPLITS, STREAM, Pool, draw_pool
from pipeline.bench.routing.tasks import ProbeTask
from pipeline.bench.routing.wordings import question
from pipeline.data.keys import Keys

CLIP = CHECKPOINTS / "clip"
TEXTS = 512  # per forward pass


@dataclass(frozen=True)
class TaskKeys:
    """The keys of a task's training and test samples."""

    name: str
    train: Keys
    test: Keys


@dataclass(frozen=True)
class Amounts:
    """How many pictures of each family and samples of each task there are."""

    pictures: int = 2000  # of training, of each family
    test: int = 200  # samples of a task
    test_pictures: int = 1000
    train_scale: int = 1  # times the training samples that a task says


def probe_keys(tasks: Sequence[ProbeTask], amounts: Amounts, seed: int) -> list[TaskKeys]:
    """The keys of the tasks' samples, a function of the arguments alone.

    Tasks with the same population of pictures draw from the same pictures; training and test samples share none.
    """
    encoder = KeyEncoder(CLIP, device="cpu")
    splits = {}
    for number, split in enumerate(SPLITS):
        count = (amounts.pictures, amounts.test_pictures)[number]
        families = {task.pictures.family for task in tasks if task.pictures is not None}
        pools = {family: draw_pool(family, split, count, seed) for family in sorted(families)}
        drawn = []
        for place, task in enumerate(tasks):
            rng = np.random.default_rng([seed, 1000 + place, number, STREAM])
            most = task.train * amounts.train_scale if split == "train" else amounts.test
            drawn.append(list(_samples(task, pools, most, rng)))
        for pool in pools.values():
            pool.encode(encoder)
        splits[split] = _encoded(tasks, drawn, pools, encoder)
    return [TaskKeys(task.name, *(splits[split][n] for split in SPLITS)) for n, task in enumerate(tasks)]


def _samples(
    task: ProbeTask, pools: dict[str, Pool], most: int, rng: np.random.Generator
) -> Iterator[tuple[int | None, str]]:
    """Up to `most` samples: the number of a picture in its family's pool (None: no picture), and a question."""
    if task.pictures is None:
        yield from ((None, question(task.topic, None, rng)) for _ in range(most))
        return
    pool = pools[task.pictures.family]
    rows = rng.permutation(pool.rows(task.pictures))[:most]
    for row in rows.tolist():
        scene = None if rng.random() < task.without else pool.scenes[row]
        yield None if scene is None else row, question(task.topic, scene, rng)


def _encoded(
    tasks: Sequence[ProbeTask], drawn: list[list[tuple[int | None, str]]], pools: dict[str, Pool], encoder: KeyEncoder
) -> list[Keys]:
    """The keys of each task's samples; each distinct question is encoded once."""
    asked = {text: row for row, text in enumerate(dict.fromkeys(text for _, text in chain(*drawn)))}
    every = list(asked)
    texts = torch.cat([encoder.text(every[first : first + TEXTS]) for first in range(0, len(every), TEXTS)]).half()
    identity = encoder.identity()
    found = []
    for task, samples in zip(tasks, drawn, strict=True):
        image = torch.zeros(len(samples), encoder.width, dtype=torch.float16)
        has_image = torch.tensor([picture is not None for picture, _ in samples], dtype=torch.bool)
        if task.pictures is not None:
            rows: list[int] = [picture for picture, _ in samples if picture is not None]
            pictures: Tensor = pools[task.pictures.family].keys
            image[has_image] = pictures[rows]
        found.append(Keys(image, texts[[asked[text] for _, text in samples]], has_image, identity))
    return found
