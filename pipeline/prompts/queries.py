"""The query of a sample, which learned keys are compared with: its CLIP keys side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


def query_of(image: Tensor, text: Tensor, has_image: Tensor) -> Tensor:
    """Unit vectors [B, 2 K] of image keys [B, K] and text keys [B, K], each of length 1 before; an image key of a
    sample without an image (`has_image` [B]) is 0."""
    pictured = normalize(image.float(), dim=-1).masked_fill(~has_image.bool()[:, None], 0.0)
    return normalize(torch.cat([pictured, normalize(text.float(), dim=-1)], dim=-1), dim=-1)


class LearnedKeys(nn.Module):
    """Trained keys [M, 2 K], read by its own call alone, where ZeRO-3 gathers them."""

    def __init__(self, count: int, key_width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.zeros(count, 2 * key_width, dtype=dtype))

    def forward(self, queries: Tensor) -> Tensor:
        """The cosines [B, M] of queries [B, 2 K]."""
        return cosines(queries, self.keys)

    def start(self, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
        """Starting values of this shape in float32: normal with deviation 0.02, so that a few steps turn them."""
        return torch.randn(shape, generator=generator) * 0.02


def cosines(queries: Tensor, keys: Tensor) -> Tensor:
    """Of unit queries [B, 2 K] to keys [M, 2 K], or [B, M, 2 K] of each query's own: [B, M] in float32."""
    unit = normalize(keys.float(), dim=-1)
    return queries @ unit.T if unit.ndim == 2 else torch.einsum("bk,bmk->bm", queries, unit)
