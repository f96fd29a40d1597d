"""The choice at the end of a search: one length per block, from the softmax of its weights."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.clip.search_space import Arrangement


@dataclass(frozen=True)
class Choice:
    """The chosen length of each block of a tower, and how far the largest weight is above the second largest."""

    lengths: list[int]
    gaps: list[float]


def choose(alphas: Tensor, options: Sequence[int], tie: float = 0.0) -> Choice:
    """The choice from `alphas` [blocks, C + 1], the weights before the softmax.

    Args:
        alphas: one row per block.
        options: the C + 1 lengths, increasing.
        tie: the shortest option whose weight is within `tie` of the largest is chosen; 0: that of the largest weight,
            the shortest of equal ones.
    """
    weights = alphas.detach().cpu().float().softmax(dim=1)
    best = weights.topk(2, dim=1).values
    near = (weights >= best[:, :1] - tie).int()
    # argmax returns the first of equal entries, which is the shortest option.
    lengths = [options[place] for place in near.argmax(dim=1).tolist()]
    return Choice(lengths, (best[:, 0] - best[:, 1]).tolist())


def arrange(lengths: Mapping[str, Sequence[int]], how: Arrangement, seed: int) -> dict[str, list[int]]:
    """The lengths of each tower's blocks as they were found, or as a control with as many prompts in the tower.

    Args:
        lengths: those found, by tower.
        how: found: unchanged; shuffled: a random order other than the one found, unless all are equal; even: as equal
            as the total allows, longer ones first.
        seed: of the random order.
    """
    drawn = random.Random(seed)
    arranged = {tower: list(found) for tower, found in lengths.items()}
    for found in arranged.values() if how == "shuffled" else ():
        before = list(found)
        while found == before and len(set(found)) > 1:
            drawn.shuffle(found)
    for found in arranged.values() if how == "even" else ():
        each, more = divmod(sum(found), len(found))
        found[:] = [each + (block < more) for block in range(len(found))]
    return arranged
