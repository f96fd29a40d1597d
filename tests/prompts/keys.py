"""Made-up routing keys: tasks that share pictures or questions, and can be told apart by both together."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.keys import Keys
from pipeline.prompts.routers import States, make_router
from pipeline.prompts.routers.kept_keys import kept_sample

WIDTH = 12


def directions(count: int, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def task_keys(
    picture: int, question: int, count: int = 60, seed: int = 0, without: int = 0, spread: float = 3.0
) -> Keys:
    """Keys of a task about pictures of one family in questions of another; the first `without` have no image.

    By `spread` samples differ in what is the same in all tasks, as CLIP's keys do.
    """
    generator = torch.Generator().manual_seed(1000 * seed + 10 * picture + question)

    def drawn(centres: Tensor, number: int) -> Tensor:
        shared = spread * (0.7 + torch.randn(count, 2, generator=generator) @ directions(2, 3))
        return centres[number] + shared + 0.4 * torch.randn(count, WIDTH, generator=generator)

    has_image = torch.arange(count) >= without
    image = drawn(directions(6, 1), picture) * has_image[:, None]
    return Keys(image.half(), drawn(directions(6, 2), question).half(), has_image, {})


# Each picture family with two questions, each question with two picture families.
PAIRS = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 0)]


def states_of(name: object, tasks: list[Keys], most: int = 128) -> States:
    router = make_router(name)  # type: ignore[arg-type]
    return States([{**router.observe(keys), **kept_sample(keys, most)} for keys in tasks])
