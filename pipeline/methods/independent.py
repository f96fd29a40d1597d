"""Independent: one set per task and the task known at inference, the upper bound for routing."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.methods.base import Method
from pipeline.prompts.pool import PromptPool


class Independent(Method):
    """Every set is trained alone; a sample of task i gets set i."""

    name = "independent"

    @property
    def needs_task(self) -> bool:
        return True

    def evaluation_sets(self, pool: PromptPool, task: int, scores: Tensor) -> Tensor:
        return torch.full((len(scores), 1), task, dtype=torch.long)
