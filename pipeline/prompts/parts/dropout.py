"""Dropout of what updates read, with masks that are a function of the sample and not of a generator's state.

A mask depends on the run's seed, the stage, the sample's place in the stage's order, the layer, the column of the
sequence and the place in the vector. So it is the same on any number of ranks, for every cut of a batch, after a
restart, and where a layer's activations are recomputed; nothing of it is stored, and it is made again for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WORD = 0xFFFFFFFF  # 32 bits in an int64, so that no product below overflows
FACTOR, STEP = 0x45D9F3B, 0x3C6EF372
LEVELS = 1 << 16  # of a rate: half of a word decides on one number
AT_ONCE = 1 << 24  # words in memory, of which each takes a few times 8 bytes


class Dropout:
    """Sets a share `rate` of its inputs to zero and scales the others by 1 / (1 - rate), in training alone.

    It is another one in each stage; `begin` takes the stage's seed from the generator of its starting values.
    """

    def __init__(self, rate: float) -> None:
        self.rate, self._seed = rate, 0

    def begin(self, generator: torch.Generator) -> None:
        """Start a stage. Without dropout the generator is left as it is."""
        if self.rate:
            self._seed = int(torch.randint(1 << 32, (), generator=generator))

    def __call__(self, inputs: Tensor, places: Tensor | None, layer: int) -> Tensor:
        """The inputs [B, N, D] of a layer, given its number, with zeros among them.

        `places` are those of the selection; None outside of training, where nothing is dropped.
        """
        if not self.rate or places is None:
            return inputs
        words = mixed(self._seed, layer, *places.reshape(len(places), -1).unbind(1))
        dropped: Tensor = _Dropped.apply(inputs, words, round(self.rate * LEVELS))
        return dropped


class _Dropped(torch.autograd.Function):
    """Keeps no mask: the gradient makes it again from the samples' words [B]."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, words: Tensor, level: int) -> Tensor:
        ctx.words, ctx.level = words, level
        return masked(inputs, words, level)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return masked(gradients[0], ctx.words, ctx.level), None, None


def masked(values: Tensor, words: Tensor, level: int) -> Tensor:
    """Values [B, N, D], of which level / `LEVELS` are set to zero by the samples' words [B], scaled up."""
    _, length, width = values.shape
    columns = torch.arange(max(length, width), device=values.device)
    rows, pairs = mixed(words[:, None], columns[:length])[..., None], mixed(1, columns[: -(-width // 2)])  # [B, N, 1]
    together = max(1, AT_ONCE // max(1, length * len(pairs)))
    hidden = torch.cat([_below(_mix(part ^ pairs), level) for part in rows.split(together)])[..., :width]
    return (values * (LEVELS / (LEVELS - level))).masked_fill(hidden, 0.0)


def _below(words: Tensor, level: int) -> Tensor:
    """Whether each half of the words [b, N, n] is below a level [b, N, 2 n]."""
    return torch.stack([(words & (LEVELS - 1)) < level, (words >> 16) < level], dim=-1).flatten(-2)


def mixed(*parts: Tensor | int) -> Any:
    """A word of 32 bits for each combination of whole numbers, which are broadcast; similar ones differ in half of
    its bits."""
    word: Any = 0
    for part in parts:
        word = _mix((word + part + STEP) & WORD)
    return word


def _mix(word: Any) -> Any:
    for _ in range(2):
        word = (((word >> 16) ^ word) * FACTOR) & WORD
    return (word >> 16) ^ word
