"""Acquisitions: the images that are worth a label by what the current model makes of them (docs/design.md 5.15).

Each returns rows of the pool in picking order, without repetition. Rows that are equally good are taken by their
number, so that a selection depends neither on batches nor on a sorting algorithm.
"""

from __future__ import annotations

import random
from typing import Protocol

import numpy as np

from pipeline.clip.active.pool import Array, PoolView, Rows

INSIDE_LOG = 1e-6  # added to probabilities in the logarithm, as published


class Uniforms(Protocol):
    """A source of random numbers such as `numpy.random.RandomState`."""

    def uniform(self) -> float:
        """A number in [0, 1)."""
        ...


def sample(unlabelled: Rows, count: int, generator: random.Random) -> list[int]:
    """`count` rows at random."""
    return generator.sample(list(unlabelled), count)


def entropy_scores(probabilities: Array) -> Array:
    """The entropy [N] of predictions [N, K], in nats."""
    scores: Array = -(probabilities * np.log(probabilities + INSIDE_LOG)).sum(axis=1)
    return scores


def entropy(view: PoolView, count: int) -> list[int]:
    """The `count` rows with the least certain predictions, the least certain first."""
    rows = np.asarray(view.unlabelled, dtype=np.int64)
    # Rounded, because equal predictions that were computed in batches of other sizes differ in the last digits.
    scores = entropy_scores(view.probabilities(view.unlabelled)).round(7)
    return [int(row) for row in rows[np.lexsort((rows, -scores))][:count]]


def coreset(view: PoolView, count: int) -> list[int]:
    """The `count` rows of the greedy k-centre: each is the farthest from all labelled and picked ones."""
    rows = np.asarray(view.unlabelled, dtype=np.int64)
    features, distances = view.features[rows], np.full(len(rows), np.inf)
    for row in view.labelled:
        distances = np.minimum(distances, _squared_distances(features, view.features[row]))
    picked: list[int] = []
    for _ in range(min(count, len(rows))):
        place = int(distances.argmax())
        picked.append(place)
        distances = np.minimum(distances, _squared_distances(features, features[place]))
        distances[picked] = -1.0  # a copy of a picked image has the distance 0 and can still be picked
    return [int(rows[place]) for place in picked]


def _squared_distances(features: Array, centre: Array) -> Array:
    result: Array = ((features - centre) ** 2).sum(axis=1)
    return result


def badge(view: PoolView, count: int, generator: Uniforms, released_batch: int | None = None) -> list[int]:
    """k-means++ over the gradients g = (onehot(guess) - p) outer f of the last layer, the largest gradient first.

    Inner products of gradients are products of those of their two factors, so no row of K * J numbers is made.

    Args:
        view: the pool.
        count: the number of rows.
        generator: gives one number in [0, 1) per draw after the first pick, and further ones for rows drawn twice.
        released_batch: with this batch size the released code's row numbers are reproduced, which go wrong in a last
            batch that is smaller (see `released_sources`); None: every row has its own gradient.
    """
    rows = np.asarray(view.unlabelled, dtype=np.int64)
    factors, features = gradient_factors(view.probabilities(view.unlabelled)), view.features[rows]
    if released_batch is not None:
        sources = np.asarray(released_sources(len(rows), released_batch), dtype=np.int64)
        factors, features = factors[sources] * (sources >= 0)[:, None], features[sources]
    norms = squared_norms(factors, features)
    first = int(norms.argmax())
    picked, free = [first], np.ones(len(rows), dtype=bool)
    free[first] = False
    nearest = np.full(len(rows), np.inf)
    while len(picked) < min(count, len(rows)):
        last = picked[-1]
        products = (factors @ factors[last]) * (features @ features[last])
        nearest = np.minimum(nearest, np.maximum(norms + norms[last] - 2 * products, 0.0))
        nearest[~free] = 0.0
        place = _drawn(nearest, free, generator)
        free[place] = False
        picked.append(place)
    return [int(rows[place]) for place in picked]


def _drawn(weights: Array, free: np.ndarray, generator: Uniforms) -> int:
    """A place that is free, with a probability in proportion to its weight."""
    sums = np.cumsum(weights)
    if sums[-1] <= 0.0:  # all that are left equal a picked one
        return int(free.argmax())
    while True:
        place = int(np.searchsorted(sums / sums[-1], generator.uniform(), side="left"))
        if free[place]:
            return place


def gradient_factors(probabilities: Array) -> Array:
    """onehot(argmax p) - p [N, K]."""
    factors = -probabilities
    factors[np.arange(len(factors)), probabilities.argmax(axis=1)] += 1.0
    return factors


def squared_norms(factors: Array, features: Array) -> Array:
    """Squared lengths [N] of the gradients with these factors [N, K] and features [N, J]."""
    result: Array = (factors**2).sum(axis=1) * (features**2).sum(axis=1)
    return result


def released_sources(count: int, batch: int) -> list[int]:
    """The row whose gradient the released code keeps in each of `count` places; -1: zeros.

    It writes row j of batch i to place i * (size of batch i) + j. A last batch that is smaller so overwrites earlier
    rows and leaves as many zeros at the end.
    """
    sources = [-1] * count
    for number, start in enumerate(range(0, count, batch)):
        size = min(batch, count - start)
        for j in range(size):
            sources[number * size + j] = start + j
    return sources
