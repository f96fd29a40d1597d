"""Routers that learn to tell the tasks apart: ridge regression of the task on features of a sample's keys, solved in
closed form (docs/routing.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipeline.data.keys import Keys, in_parts
from pipeline.prompts.routers.base import Router, States
from pipeline.prompts.routers.kept_keys import KeptKeys, kept_keys, picked
from pipeline.prompts.routers.key_features import whitened, whitening
from pipeline.prompts.routers.mean import KeyWeights

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys
    from pipeline.prompts.routers.states import State

AT_ONCE = 1 << 12  # samples whose features are in memory
FITTED = 1 << 15  # most kept keys that the regression is fitted to, as many of each task
# What is fitted beside the whitening: [F, T], the column of each task [T], and of each kept key [n].
WEIGHTS, PLACES, LEVERAGE = "weights", "places", "leverage"


class RidgeOptions(KeyWeights):
    """How strongly the regression is held back."""

    ridge: float = Field(
        3e-3, gt=0, description="the penalty, as a share of the mean eigenvalue of the features' second moments"
    )


class Ridge(Router):
    """Scores are `W^T features`, where W minimises the squared error of predicting which task a kept key belongs to.

    Every task counts the same, however many keys it keeps. Features are both whitened keys, whether there is no image,
    and a constant.
    """

    Options = RidgeOptions
    needs_keys = True
    joint = True
    passing = (LEVERAGE,)
    fewest = 4  # with fewer, what is left of a task when one is left out says little about it

    def observe(self, keys: AnyKeys) -> State:
        return {}

    def features(self, keys: Keys, fitted: Mapping[str, Tensor]) -> Tensor:
        """Features [B, F] of samples in float32, given the whitening."""
        plain = self._plain(keys, fitted)
        return torch.cat([plain, torch.ones(len(plain), 1)], dim=1)

    def scores(self, keys: AnyKeys, states: States) -> Tensor:
        if not len(states):
            return torch.zeros(len(keys.text), 0)
        fitted = self.fitted(states)
        weights, places = fitted[WEIGHTS], fitted[PLACES]
        # Columns are multiplied in the order in which they were solved: their place changes the last bits of a product.
        found = [(self.features(part, fitted) @ weights)[:, places] for part in in_parts(keys, AT_ONCE)]
        return torch.cat(found) if found else torch.zeros(0, len(states))

    def held_out_scores(self, states: States, rows: Tensor) -> Tensor:
        """As the regression without each key gives them: (score - leverage * target) / (1 - leverage)."""
        kept, fitted = _required(states), self.fitted(states)
        scores = self.scores(picked(kept.keys, rows), states)
        leverage = fitted[LEVERAGE][rows, None]
        own = torch.zeros_like(scores).scatter_(1, kept.tasks[rows, None], 1.0)
        return (scores - leverage * own) / (1.0 - leverage).clamp_min(1e-6)

    def views(self) -> dict[str, Router]:
        either = {"image_only": 1.0, "text_only": 0.0}
        options = {name: self.options.model_copy(update={"image_weight": weight}) for name, weight in either.items()}
        return {"accuracy": self, **{name: type(self)(given) for name, given in options.items()}}

    def fit(self, states: States) -> dict[str, Tensor]:
        """The whitening, W [F, T], the column of each task [T], and each kept key's leverage [n]; solved in float64.

        The leverage of a key is the share of its own target in its score.
        """
        kept = _required(states)
        rows = kept.balanced(FITTED)
        places = kept.places[rows]
        weights = 1.0 / torch.bincount(places)[places].double()  # every task's keys together count 1
        some = _Rows(kept, rows.split(AT_ONCE), weights.split(AT_ONCE), places.split(AT_ONCE))
        fitted = whitening(some.weighted_keys)
        solution = self._solution(some, fitted)
        leverage = torch.zeros(len(kept.places))  # of a key that is not among the rows its target has no share
        leverage[rows] = solution.leverage.float()
        return {**fitted, WEIGHTS: solution.weights.float(), PLACES: kept.order.argsort(), LEVERAGE: leverage}

    def _plain(self, keys: Keys, fitted: Mapping[str, Tensor]) -> Tensor:
        """[a_v g_v; a_x g_x; no image] of whitened keys [B, 2 K + 1]; see `side_by_side`."""
        image, text, missing = whitened(keys, fitted)
        weight = 2.0 * self.options.image_weight
        return torch.cat([weight**0.5 * image, (2.0 - weight) ** 0.5 * text, missing], dim=1)

    def _solution(self, some: _Rows, fitted: Mapping[str, Tensor]) -> _Solution:
        """Solved in the smaller of two systems: of the n kept keys, or of the F features."""
        tasks, parts = len(some.kept.order), range(len(some.rows))

        def weighted(part: int) -> Tensor:
            """Features [B, F] times the roots of their weights."""
            return self.features(picked(some.kept.keys, some.rows[part]), fitted) * some.roots(part).float()

        width = weighted(0).shape[1]
        if sum(map(len, some.rows)) <= width:
            targets = torch.zeros(sum(map(len, some.rows)), tasks, dtype=torch.float64)
            targets[torch.arange(len(targets)), torch.cat(some.places)] = torch.cat(some.weights).sqrt()
            return _dual(torch.cat([weighted(part) for part in parts]).double(), targets, self.options.ridge)
        moments = torch.zeros(width, width, dtype=torch.float64)
        sums = torch.zeros(tasks, width, dtype=torch.float64)
        for part in parts:
            # Products in float32 of a part at a time, which are summed in float64.
            features = weighted(part)
            moments += features.T @ features
            sums.index_add_(0, some.places[part], features.double() * some.roots(part))
        penalty = self.options.ridge * float(moments.trace()) / width
        identity = torch.eye(width, dtype=torch.float64)
        factor = torch.linalg.cholesky(moments + penalty * identity)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False).T.float()
        leverage = [(weighted(part) @ inverse).square().sum(1) for part in parts]
        return _Solution(torch.cholesky_solve(sums.T, factor), torch.cat(leverage))


class RandomRidgeOptions(RidgeOptions):
    """Which random features there are."""

    width: int = Field(2000, ge=1, description="random features")
    seed: int = Field(0, ge=0, lt=2**32, description="of the random features, which are the same on every machine")


class RandomRidge(Ridge):
    """`Ridge` on more features: rectified random projections of the whitened keys.

    So it tells apart what no key tells alone, such as a picture of one task with a question of another.
    """

    Options = RandomRidgeOptions

    def features(self, keys: Keys, fitted: Mapping[str, Tensor]) -> Tensor:
        plain, width = self._plain(keys, fitted), self.options.width
        drawn = torch.relu(plain @ projection(plain.shape[1], width, self.options.seed)) / width**0.5
        return torch.cat([plain, drawn, torch.ones(len(plain), 1)], dim=1)


@lru_cache(maxsize=2)
def projection(inputs: int, outputs: int, seed: int) -> Tensor:
    """A random matrix [inputs, outputs] of standard normal numbers."""
    # RandomState, because numpy keeps its numbers the same in all versions and on all machines.
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((inputs, outputs)).astype(np.float32))


@dataclass(frozen=True)
class _Rows:
    """The kept keys that a regression is fitted to, in parts of `AT_ONCE`."""

    kept: KeptKeys
    rows: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]  # how much each counts, in float64
    places: tuple[Tensor, ...]  # the places of their tasks

    def weighted_keys(self) -> Iterator[tuple[Keys, Tensor]]:
        """The keys of each part with their weights."""
        return ((picked(self.kept.keys, rows), own) for rows, own in zip(self.rows, self.weights, strict=True))

    def roots(self, part: int) -> Tensor:
        """The roots of a part's weights [B, 1]."""
        return self.weights[part].sqrt()[:, None]


@dataclass(frozen=True)
class _Solution:
    """Of a ridge regression, in float64."""

    weights: Tensor  # [F, T], the tasks in the order of their targets
    leverage: Tensor  # [n]


def _dual(features: Tensor, targets: Tensor, ridge: float) -> _Solution:
    """The regression of weighted targets [n, T] on weighted features [n, F], by the system of the n samples."""
    products = features @ features.T
    penalty = ridge * float(products.trace()) / features.shape[1]
    factor = torch.linalg.cholesky(products + penalty * torch.eye(len(products), dtype=torch.float64))
    weights = features.T @ torch.cholesky_solve(targets, factor)
    return _Solution(weights, 1.0 - penalty * torch.cholesky_inverse(factor).diagonal())


def _required(states: States) -> KeptKeys:
    kept = kept_keys(states)
    if kept is None:
        raise ValueError("a router that is fitted to kept keys was given states without any")
    return kept
