"""Class-guided clustering: an image nearest to each centre of features mixed with the texts of its likely classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.clip.active.pool import Array, PoolView, Rows, softmax, unit_length
from pipeline.errors import UserError

KMEANS_SEED = 42  # as published
KMEANS_ITERATIONS = 300
KMEANS_TOLERANCE = 1e-4  # of the mean variance: k-means stops when its centres move less
AT_ONCE = 4096  # rows whose distances to all centres are held in memory


def guided_features(features: Array, logits: Array, texts: Array) -> Array:
    """[f ; sum_c p_c t_c] [N, 2J] with unit text features `texts` [K, J]; not of unit length."""
    return np.concatenate([features, softmax(logits) @ texts], axis=1)


@dataclass(frozen=True)
class Clusters:
    """The cluster of each of R rows, and the centres [C, 2J]."""

    numbers: npt.NDArray[np.int64]
    centres: Array


def kmeans(vectors: Array, count: int, seed: int = KMEANS_SEED) -> Clusters:
    """Lloyd's algorithm from k-means++; UserError for more clusters than vectors.

    A cluster that loses its last member gets the vector that is farthest from its centre.
    """
    if count > len(vectors):
        raise UserError(
            f"{len(vectors)} images cannot form {count} clusters. Ask for fewer labels per round, or give more images."
        )
    generator = np.random.RandomState(seed)
    centres = _first_centres(vectors, count, generator)
    enough = KMEANS_TOLERANCE * float(vectors.var(axis=0).mean())
    numbers = _assigned(vectors, centres)
    for _ in range(KMEANS_ITERATIONS):
        moved = np.zeros_like(centres)
        np.add.at(moved, numbers, vectors)
        moved /= np.bincount(numbers, minlength=count)[:, None]
        shift, centres, before = float(((moved - centres) ** 2).sum()), moved, numbers
        numbers = _assigned(vectors, centres)
        if shift <= enough or bool((before == numbers).all()):
            break
    return Clusters(numbers, centres)


def _first_centres(vectors: Array, count: int, generator: np.random.RandomState) -> Array:
    """k-means++: each centre is a vector, drawn in proportion to its squared distance from the nearest earlier one."""
    chosen = [int(generator.randint(len(vectors)))]
    nearest = ((vectors - vectors[chosen[0]]) ** 2).sum(axis=1)
    while len(chosen) < count:
        sums = np.cumsum(nearest)
        place = int(np.searchsorted(sums / max(sums[-1], 1e-300), generator.uniform(), side="left"))
        chosen.append(min(place, len(vectors) - 1))
        nearest = np.minimum(nearest, ((vectors - vectors[chosen[-1]]) ** 2).sum(axis=1))
    return vectors[chosen].copy()


def _assigned(vectors: Array, centres: Array) -> npt.NDArray[np.int64]:
    """The nearest centre of each vector; a centre that is nearest to none gets, and moves to, the farthest vector."""
    squares, nearest, least = (centres**2).sum(axis=1), [], []
    for start in range(0, len(vectors), AT_ONCE):
        part = vectors[start : start + AT_ONCE]
        found = squares - 2 * part @ centres.T + (part**2).sum(axis=1)[:, None]
        nearest.append(found.argmin(axis=1))
        least.append(found.min(axis=1))
    numbers, distances = np.concatenate(nearest).astype(np.int64), np.concatenate(least)
    for empty in np.flatnonzero(np.bincount(numbers, minlength=len(centres)) == 0):
        sizes = np.bincount(numbers, minlength=len(centres))
        place = int(np.where(sizes[numbers] > 1, distances, -np.inf).argmax())
        numbers[place], distances[place], centres[empty] = empty, 0.0, vectors[place]
    return numbers


def pick_from_clusters(guided: Array, clusters: Clusters, labelled: int, count: int) -> list[int]:
    """`count` places of the rows of `guided`, cluster by cluster, in each the unlabelled members nearest to its centre.

    The first `labelled` rows are labelled. One after the other, the cluster with the smallest labelled share, of equal
    ones the largest, then the first, gets one more.
    """
    sizes = np.bincount(clusters.numbers, minlength=len(clusters.centres))
    known = np.bincount(clusters.numbers[:labelled], minlength=len(sizes))
    free, given = sizes - known, np.zeros_like(sizes)
    for _ in range(count):
        able = np.flatnonzero(given < free).tolist()
        chosen = min(able, key=lambda c: ((known[c] + given[c]) / sizes[c], -sizes[c], c))
        given[chosen] += 1
    vectors, centres = unit_length(guided), unit_length(clusters.centres)
    picked: list[int] = []
    for cluster in np.flatnonzero(given):
        members = np.flatnonzero(clusters.numbers == cluster)
        members = members[members >= labelled]
        # Rounded, because both members of a cluster of two are equally near and rounding would decide.
        near = (vectors[members] @ centres[cluster]).round(7)
        picked += members[np.lexsort((members, -near))][: given[cluster]].tolist()
    return picked


def class_guided(view: PoolView, texts: Array, count: int, clusters: int) -> list[int]:
    """`count` unlabelled rows from `clusters` clusters of all rows; `texts` [K, J] are unit text features."""
    rows = [*view.labelled, *view.unlabelled]
    guided = unit_length(guided_features(view.features[rows], view.logits[rows], texts))
    found = kmeans(guided, clusters)
    return [rows[place] for place in pick_from_clusters(guided, found, len(view.labelled), count)]


def clusters_of(labels: int, labelled: int, free_labels: bool) -> int:
    """The number of clusters of a round that asks for `labels` labels when `labelled` images have one."""
    return (4 * labels if free_labels and labelled else labels) + labelled


def free_labels(view: PoolView, labels: Sequence[int], picked: Rows) -> dict[int, int]:
    """The picked rows that the model is sure enough of to take its guess as their label, with that guess.

    It is where its confidence reaches the mean confidence of the labelled images of the guessed class; `labels` are
    those of `view.labelled`. A class without a labelled image gives none.
    """
    confidences: dict[int, list[float]] = {}
    sure = view.probabilities(view.labelled).max(axis=1) if labels else np.zeros(0)
    for label, confidence in zip(labels, sure.tolist(), strict=True):
        confidences.setdefault(label, []).append(confidence)
    thresholds = {label: float(np.mean(values)) for label, values in confidences.items()}
    guesses, chances = view.guesses(picked), view.probabilities(picked).max(axis=1).tolist()
    return {
        row: guess
        for row, guess, chance in zip(picked, guesses, chances, strict=True)
        if guess in thresholds and chance >= thresholds[guess]
    }
