"""A task's test set."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from pipeline.data.stage_data import StageData
from pipeline.data.texts import Texts


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
