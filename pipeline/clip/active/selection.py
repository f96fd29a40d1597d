"""The images that one round asks for: chosen by acquisition and balance, kept as JSON to be repeated by no one."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.clip.active import acquire
from pipeline.clip.active.balance import pcb
from pipeline.clip.active.class_guided import class_guided, clusters_of, free_labels
from pipeline.clip.active.oracle import Oracle
from pipeline.clip.active.pool import Array, PoolView
from pipeline.clip.recipe_active import ActiveConfig, AskingConfig

RELEASED_BATCH = 100  # images per batch of the released code's selection


@dataclass(frozen=True)
class Selection:
    """What one round asked for; the rows of all rounds so far are those that it trains on.

    `free` are rows whose label is the model's guess, which costs nothing. `generators` are the states of the random
    generators after it. An image of none of the classes has the label `UNLABELLED`: it was asked for, but nothing
    learns from it.
    """

    pool: str  # hash of class names and images
    rows: tuple[int, ...]
    images: tuple[str, ...]
    guesses: tuple[int, ...]  # of the model of the round before; none in a round drawn at random
    labels: tuple[int, ...]  # none while the answers are waited for
    free: tuple[int, ...]
    generators: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of selection.json, or of asked.json where the answers are waited for."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Selection:
        """The selection that `to_json` wrote; TypeError or KeyError for another object."""
        lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return cls(**{**found, **lists})

    def answered(self, oracle: Oracle) -> Selection:
        """The selection with the labels of its rows: asked of the oracle, and guessed for those that are free."""
        guessed = dict(zip(self.rows, self.guesses, strict=True)) if self.free else {}
        asked = [row for row in self.rows if row not in self.free]
        answers = dict(zip(asked, oracle.answers(asked), strict=True)) | {row: guessed[row] for row in self.free}
        return replace(self, labels=tuple(answers[row] for row in self.rows))


class Generators:
    """Python's and numpy's generator of one unit, which go on from round to round as the released code's do."""

    def __init__(self, seed: int) -> None:
        self.python, self.numpy = random.Random(seed), np.random.RandomState(seed)

    def state(self) -> dict[str, Any]:
        """Both states as JSON."""
        version, words, following = self.python.getstate()
        _, key, position, has, cached = self.numpy.get_state()
        numpy = {"key": [int(word) for word in key], "position": position, "has": has, "cached": cached}
        return {"python": [version, list(words), following], "numpy": numpy}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from an earlier `state`."""
        version, words, following = state["python"]
        self.python.setstate((version, tuple(words), following))
        found = state["numpy"]
        key = np.array(found["key"], dtype=np.uint32)
        self.numpy.set_state(("MT19937", key, found["position"], found["has"], found["cached"]))


@dataclass(frozen=True)
class Scored:
    """A pool as a model sees it, and the unit text features [K, J] of the classes."""

    view: PoolView
    texts: Array


class Selector:
    """Chooses the images of each round of one unit; for rank 0.

    Args:
        active: the recipe's section.
        row: what the row asks for.
        pool: the hash of the pool.
        images: the names of its images.
        classes: the number of classes.
    """

    def __init__(self, active: ActiveConfig, row: AskingConfig, pool: str, images: Sequence[str], classes: int) -> None:
        self.active, self.row, self.pool, self.images = active, row, pool, images
        self.classes, self.count = classes, active.labels(classes)

    def needs_model(self, number: int) -> bool:
        """Whether the round of this number (from 0) depends on what a model predicts."""
        if number == 0:
            return "class_guided" in (self.active.first, self.row.acquire)
        return self.row.acquire != "random"

    def select(self, earlier: Sequence[Selection], scored: Scored | None, generators: Generators) -> Selection:
        """The next round's images after `earlier` ones, without labels (see `Selection.answered`).

        `scored` is the pool where `needs_model` says so.
        """
        known = [row for selection in earlier for row in selection.rows]
        labels = [label for selection in earlier for label in selection.labels]
        if scored is None:
            taken = set(known)
            rest = [row for row in range(len(self.images)) if row not in taken]
            rows, guesses = acquire.sample(rest, self.count, generators.python), []
        else:
            scored.view.refuse_broken(self.images)
            rows = self._by_model(len(earlier), scored, labels, generators)
            guesses = scored.view.guesses(rows)
        free: dict[int, int] = {}
        if self.row.free_labels and scored is not None and earlier:
            free = free_labels(scored.view, labels, rows)
        return Selection(
            self.pool,
            tuple(rows),
            tuple(self.images[row] for row in rows),
            tuple(guesses),
            (),
            tuple(sorted(free)),
            generators.state(),
        )

    def _by_model(self, number: int, scored: Scored, labels: Sequence[int], generators: Generators) -> list[int]:
        view, count = scored.view, self.count
        if number == 0 or self.row.acquire == "class_guided":
            clusters = clusters_of(count, len(view.labelled), self.row.free_labels)
            return class_guided(view, scored.texts, count, clusters)
        wanted = max(count, int(self.active.candidates * len(self.images))) if self.row.balances else count
        by_name: dict[str, Callable[[], list[int]]] = {
            "entropy": lambda: acquire.entropy(view, wanted),
            "coreset": lambda: acquire.coreset(view, wanted),
            "badge": lambda: acquire.badge(
                view, wanted, generators.numpy, RELEASED_BATCH if self.row.badge == "released" else None
            ),
        }
        candidates = by_name[str(self.row.acquire)]()
        if not self.row.balances:
            return candidates
        counts = [labels.count(c) for c in range(self.classes)]
        released = self.row.balance == "pcb_released"
        return pcb(candidates, view.guesses(candidates), counts, count, generators.python, released)
