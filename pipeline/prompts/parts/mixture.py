"""Weighted sums of low-rank modules, each row or token of a batch with its own weights, in one batched computation."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.data.selection import NO_SET, Selection

# Gathering each row's own modules copies them; computing all used ones for every row takes more operations. A copied
# number costs about as much as so many products.
COPY = 8


@dataclass(frozen=True)
class Mixture:
    """Which of M modules the B rows of a batch get and with what weights; made once and used in every layer.

    A layer computes the U modules that any row gets, weighted by row, or gathers each row's own m of them, whichever
    takes fewer operations. Neither grows with M.
    """

    used: Tensor | None  # [U] numbers of the modules that any row gets; None: all M
    share: Tensor | None  # [B, U]; None: every row gets each of them in full
    numbers: Tensor  # [B, m]
    weights: Tensor  # [B, m]; 0 where a row has fewer than m modules
    # The joined factors of each layer, for the next token of the same rows; not kept in training.
    joined: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, selection: Selection, modules: int) -> Mixture | None:
        """The mixture of a selection among so many modules; None where no row gets any."""
        numbers, weights = selection.numbers, selection.full_weights()
        if not numbers.numel() or not modules:
            return None
        if selection.weights is not None:  # what counts nothing is not computed
            numbers = numbers.masked_fill(weights == 0, NO_SET)
        used = numbers.unique()
        used = used[used != NO_SET]
        if not len(used):
            return None
        place = torch.zeros(modules, dtype=torch.long, device=numbers.device)
        place[used] = torch.arange(len(used), device=numbers.device)
        chosen = numbers.masked_fill(numbers == NO_SET, int(used[0]))  # with the weight 0
        share = weights.new_zeros(len(numbers), len(used)).scatter_add(1, place[chosen], weights)
        whole = bool((share == 1).all())
        return cls(None if len(used) == modules else used, None if whole else share, chosen, weights)

    def added(self, inputs: Tensor, a: Tensor, b: Tensor, layer: str = "") -> Tensor:
        """sum_i w_i B_i A_i x [B, N, outputs] of inputs [B, N, D], `a` [M, r, D] and `b` [M, outputs, r].

        Inputs [B, N] are token ids, each in place of its one-hot vector of width D. `layer` is the name by which
        joined factors are found again.
        """
        used, m = len(a) if self.used is None else len(self.used), self.numbers.shape[1]
        gathers = inputs.shape[1] * (used - m) > COPY * m
        if are_words(inputs):
            everyone = torch.arange(len(a), device=a.device) if self.used is None else self.used
            numbers = self.numbers if gathers else everyone
            up = b[numbers].transpose(-2, -1).flatten(-3, -2)  # [B, m * r, outputs] or [U * r, outputs]
            return weighted(of_words(inputs, a, numbers), up, self.weights if gathers else self.share)
        if gathers:
            down = a[self.numbers].flatten(1, 2).transpose(1, 2)  # [B, D, m * r]
            up = b[self.numbers].transpose(2, 3).flatten(1, 2)  # [B, m * r, outputs]
            return weighted_sum(inputs, down, up, self.weights)
        factors = self.joined.get(layer)
        if factors is None:
            if self.used is not None:
                a, b = a[self.used], b[self.used]
            factors = a.flatten(0, 1).T, b.transpose(1, 2).flatten(0, 1)
            if layer and not torch.is_grad_enabled():
                self.joined[layer] = factors
        return weighted_sum(inputs, *factors, self.share)


def weighted_sum(inputs: Tensor, down: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted outputs of U modules of rank r, added up [B, N, outputs].

    Args:
        inputs: [B, N, D].
        down: their A side by side, [D, U * r] or by row [B, D, U * r].
        up: their B below each other, [U * r, outputs] or by row [B, U * r, outputs].
        weights: [B, U] by row, [B, N, U] by token; None: 1.
    """
    return weighted(inputs @ down, up, weights)


def weighted(hidden: Tensor, up: Tensor, weights: Tensor | None) -> Tensor:
    """As `weighted_sum`, of what the modules' A make of the inputs, side by side [B, N, U * r]."""
    if weights is not None:
        spread = weights[:, None] if weights.ndim == 2 else weights  # [B, 1 or N, U]
        rank = hidden.shape[-1] // weights.shape[-1]
        hidden = hidden * spread.to(hidden.dtype).repeat_interleave(rank, dim=-1)
    return hidden @ up


def are_words(inputs: Tensor) -> bool:
    """Whether a layer's inputs are token ids [B, N], as those of the input embeddings are."""
    return not inputs.is_floating_point()


def of_words(ids: Tensor, a: Tensor, numbers: Tensor) -> Tensor:
    """A_i x of one-hot vectors x, for several modules side by side [B, N, m * r].

    Only the columns of the words are copied, never a module's whole A.

    Args:
        ids: [B, N], the places of the ones.
        a: [M, r, V].
        numbers: which modules, the same for all rows [m] or by row [B, m].
    """
    return a[numbers.unsqueeze(-2), :, ids[..., None]].flatten(2)
