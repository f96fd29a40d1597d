"""Zero-shot: the frozen model as it is, the lower bound."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.data.selection import NO_SET
from pipeline.methods.base import Method, Stage
from pipeline.prompts.pool import PromptPool


class ZeroShot(Method):
    """No stage and no set."""

    name = "zero_shot"

    def stages(self, tasks: Sequence[str]) -> list[Stage]:
        return []

    def evaluation_sets(self, pool: PromptPool, task: int, scores: Tensor) -> Tensor:
        return torch.full((len(scores), 0), NO_SET, dtype=torch.long)
