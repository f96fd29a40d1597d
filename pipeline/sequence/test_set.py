"""A task's test set, and how similar its samples are to the prompt sets of a pool."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.collate import StageData
from pipeline.data.texts import Texts
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routing import similarities


@dataclass(frozen=True)
class TestSet:
    """The samples that one task is scored on, and how."""

    __test__ = False  # not a test case, whatever its name suggests to pytest

    name: str
    metric: str
    max_new_tokens: int
    data: StageData
    scoring: str = "fixed"
    unanswered: frozenset[int] = frozenset()  # indices of samples too long for the model, see data.too_long

    @functools.cached_property
    def texts(self) -> Texts:
        """Question, answer and meta of every sample, read at most once."""
        return Texts(self.data)

    def similarity(self, pool: PromptPool, image_weight: float) -> Tensor:
        """Similarities [N, T] of the samples to the pool's prototypes."""
        if not len(pool):
            return torch.zeros(len(self.data), 0)
        return similarities(self.data.keys, pool.prototypes.cpu(), image_weight)
