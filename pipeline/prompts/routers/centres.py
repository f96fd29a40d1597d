"""A router with several centres per task: the nearest of them counts (spherical k-means, Dhillon and Modha 2001)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.data.keys import Keys, in_parts
from pipeline.prompts.routers.base import Router, State, States
from pipeline.prompts.routers.kept_keys import kept_keys, picked, sampled_rows
from pipeline.prompts.routers.key_features import side_by_side
from pipeline.prompts.routers.mean import SAMPLES_AT_ONCE, KeyWeights

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys

CENTRES = "centres"  # the tensor [J, 2 K + 1] of a task's state: each the sum of the unit vectors that it stands for
OBSERVED = 4096  # most samples of a task that its centres are made of
ROUNDS = 50  # of k-means, unless it settles earlier


class CentresOptions(KeyWeights):
    """How many centres a task has."""

    centres: int = Field(8, ge=1, description="centres of a task; fewer where it has fewer different samples")
    seed: int = Field(0, ge=0, lt=2**32, description="of the samples that the search for centres starts from")


class Centres(Router):
    """The largest cosine to one of a task's centres, of both keys side by side as one unit vector.

    The centres of a task are a function of its own keys, so they say nothing of what tells it from others.
    """

    Options = CentresOptions
    names = (CENTRES,)

    def observe(self, keys: AnyKeys) -> State:
        vectors = self._vectors(picked(keys, sampled_rows(len(keys.text), OBSERVED)))
        return {CENTRES: spherical_centres(vectors, self.options.centres, self.options.seed)}

    def scores(self, keys: AnyKeys, states: States) -> Tensor:
        if not len(states):
            return torch.zeros(len(keys.text), 0)
        fitted = self.fitted(states)
        centres, counts = fitted[CENTRES], fitted["counts"].tolist()
        found = []
        for part in in_parts(keys, SAMPLES_AT_ONCE):
            cosines = self._vectors(part) @ centres.T
            found.append(torch.stack([own.amax(1) for own in cosines.split(counts, dim=1)], dim=1))
        return torch.cat(found) if found else torch.zeros(0, len(states))

    def fit(self, states: States) -> dict[str, Tensor]:
        """The centres of all tasks, one behind the other, and how many each task has."""
        centres = [normalize(state[CENTRES], dim=1) for state in states]
        return {CENTRES: torch.cat(centres).cpu(), "counts": torch.tensor([len(own) for own in centres])}

    def held_out_scores(self, states: States, rows: Tensor) -> Tensor:
        """As the centres without each key give them: its own nearest centre is moved by what it adds to its sum."""
        kept = kept_keys(states)
        assert kept is not None
        keys = picked(kept.keys, rows)
        scores, vectors, tasks = self.scores(keys, states), self._vectors(keys), kept.tasks[rows]
        for task in tasks.unique().tolist():
            mine, sums = tasks == task, states[task][CENTRES].cpu()
            products, squares = vectors[mine] @ sums.T, sums.square().sum(1)
            cosines = products / squares.sqrt().clamp_min(1e-9)
            nearest = cosines.argmax(1, keepdim=True)
            product, square = products.gather(1, nearest), squares[nearest]
            left = (square - 2.0 * product + 1.0).clamp_min(0.0).sqrt()
            # Nothing is left of a centre of one key alone.
            without = torch.where(left > 1e-3, (product - 1.0) / left.clamp_min(1e-3), torch.full_like(left, -1.0))
            scores[mine, task] = cosines.scatter(1, nearest, without).amax(1)
        return scores

    def _vectors(self, keys: Keys) -> Tensor:
        return normalize(side_by_side(keys, self.options.image_weight), dim=1)


def spherical_centres(vectors: Tensor, most: int, seed: int) -> Tensor:
    """At most `most` centres [J, F] of unit vectors [n, F], each the sum of those that are nearest to its direction.

    Starts from vectors that are drawn the more probably the farther they are from those drawn before (k-means++,
    Arthur and Vassilvitskii 2007), with numbers that are the same everywhere.
    """
    points, random = vectors.double(), np.random.RandomState(seed)
    # Unit vectors until the end.
    centres = points[[int(random.randint(len(points)))]]
    while len(centres) < most:
        # 1 - cosine is half the squared distance; rounding may leave something of a vector that is a centre already.
        far = (1.0 - (points @ centres.T).amax(1)).clamp_min(0.0)
        far[far < 1e-9] = 0.0
        if not far.any():
            break
        reached = int(torch.searchsorted(far.cumsum(0), float(random.random_sample()) * float(far.sum()), right=True))
        centres = torch.cat([centres, points[[min(reached, int(far.nonzero()[-1]))]]])
    nearest = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        found = (points @ centres.T).argmax(1)
        if torch.equal(found, nearest):
            break
        nearest = found
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = normalize(sums[sums.norm(dim=1) > 1e-9], dim=1)  # without centres that are nearest to no vector
    return sums[sums.norm(dim=1) > 1e-9].float()
