"""A step of AdamW without DeepSpeed, so that only the arithmetic of variants is compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data.collate import Batch

RATE = 2e-4


class OptimizerStep:
    """Steps on `parameters`; a variant computes its `losses`."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.0)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and what a step returns of it."""
        raise NotImplementedError

    def __call__(self, batch: Batch) -> Tensor:
        """Do one step and return the second of `losses`."""
        self.optimizer.zero_grad()
        loss, told = self.losses(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return told.detach()

    @property
    def held(self) -> dict[str, Any]:
        """Tensors that live from step to step."""
        return {
            "trained": self.parameters,
            "moments": [list(state.values()) for state in self.optimizer.state.values()],
        }
