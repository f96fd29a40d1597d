"""A task's test set."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pipeline.data.stage_data import StageData
from pipeline.data.texts import Texts


@dataclass(frozen=True)
class TestSet:
    """The test samples of one task, with metric and generation settings."""

    __test__ = False  # pytest would collect a class whose name starts with Test

    name: str
    metric: str
    max_new_tokens: int
    data: StageData
    scoring: str = "fixed"
    unanswered: frozenset[int] = frozenset()  # indices of samples too long for the model, see data.too_long

    @functools.cached_property
    def texts(self) -> Texts:
        """Question, answer and meta of every sample, read once."""
        return Texts(self.data)
