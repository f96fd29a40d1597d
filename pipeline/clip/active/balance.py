"""Balancing: of an acquisition's candidates, take those guessed to be of the classes with the fewest labels."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pipeline.clip.active.pool import Rows
from pipeline.errors import UserError


def pcb(
    candidates: Rows,
    guesses: Sequence[int],
    labelled: Sequence[int],
    count: int,
    generator: random.Random,
    released: bool = False,
) -> list[int]:
    """Pseudo-class balancing: repeatedly one candidate guessed as the class that has the fewest labels so far.

    The released code starves: once that class has no candidate left, no pick raises its count, so it stays the
    scarcest and every further pick of the round is random. Here classes without a free candidate are passed over.

    Args:
        candidates: rows of the pool, in the order of the acquisition.
        guesses: the guessed class of each candidate.
        labelled: the number of labelled images of each class; picks of this round are added by their guess.
        count: how many to pick, at most as many as there are candidates.
        generator: shuffles the candidates of a class, and draws rows where `released` picks at random.
        released: pick at random while the scarcest class has no free candidate, as released.
    """
    if count > len(candidates):
        raise UserError(f"{count} images cannot be picked from {len(candidates)} candidates. Set more candidates.")
    counts, picked = list(labelled), dict[int, None]()
    of_class = [[p for p, guess in enumerate(guesses) if guess == c] for c in range(len(counts))]
    while len(picked) < count:
        able = [c for c, places in enumerate(of_class) if released or any(p not in picked for p in places)]
        scarcest = min(able, key=counts.__getitem__)
        places = list(of_class[scarcest])
        generator.shuffle(places)
        place = next((p for p in places if p not in picked), None)
        if place is None:
            place = generator.randint(0, len(candidates) - 1)
            while place in picked:
                place = generator.randint(0, len(candidates) - 1)
        else:
            counts[scarcest] += 1
        picked[place] = None
    return [candidates[place] for place in picked]
