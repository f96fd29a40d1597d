"""The projection head: it maps a prompt set into the space of the CLIP keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Two linear layers with a SiLU between them, D -> D -> K (docs/design.md 4.1, f_i)."""

    def __init__(self, width: int, key_width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width, dtype=dtype)
        self.fc2 = nn.Linear(width, key_width, dtype=dtype)

    def forward(self, prompt: Tensor) -> Tensor:
        """The prototype [K] of a prompt set [L, D]: the mean over L of the projected vectors (docs/design.md 4.4)."""
        return self.fc2(nn.functional.silu(self.fc1(prompt))).mean(dim=-2)
