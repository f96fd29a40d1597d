"""How much a decoder and an answer head count, fitted to held-out samples of a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

STEPS = 100  # of Newton's method
SHARES = (1.0, 0.5, 0.25, 0.0)  # of the decoder's power: see `fit_mix`
Array = npt.NDArray[np.float64]


class Mix(NamedTuple):
    """How decoder and head count at known tokens c, and S = sum_c p_c.

    p_c is the decoder's probability of the token c. q_c is the head's probability of one known answer: of those that
    have c as their next token, the most probable.
    A token is a known one with sigma(`slope` log(S / (1 - S)) + `known`), and of these each has a share in proportion
    to p_c^`decoder` q_c^`head`. The values here are what holds without samples: the head's probabilities are
    calibrated, and both count as they are.
    """

    decoder: float = 1.0
    head: float = 1.0
    slope: float = 1.0
    known: float = 0.0


# Deviations of the fitted values from `Mix()`: the strength of their prior.
DOUBT = Mix(1.0, 1.0, 1.0, 4.0)


@dataclass(frozen=True)
class Branch:
    """One token of a held-out answer: what decoder and head say of the m tokens that known answers have there."""

    decoder: Array  # [m + 1] logarithms; the last of all other tokens together
    head: Array  # [m] logarithms up to a constant
    right: int  # which of the m + 1 it is
    other: float = 0.0  # the logarithm of the share that the most probable other token has of them

    @property
    def unknown(self) -> bool:
        """Whether the answer leaves the known ones here."""
        return self.right == len(self.head)

    @property
    def odds(self) -> float:
        """The logarithm of the decoder's odds that it is one of the known tokens."""
        return float(np.logaddexp.reduce(self.decoder[:-1]) - self.decoder[-1])

    def right_by(self, mix: Mix) -> bool:
        """Whether the token, or one of the others where it is one, would be the most probable one."""
        odds = mix.slope * self.odds + mix.known
        powers = mix.decoder * self.decoder[:-1] + mix.head * self.head
        known = powers - np.logaddexp.reduce(powers) - np.logaddexp(0.0, -odds)
        place, other = int(known.argmax()), self.other - np.logaddexp(0.0, odds)
        return (place if known[place] >= other else len(known)) == self.right


@dataclass(frozen=True)
class HeldOut:
    """What decoder and head say along one held-out answer."""

    branches: Sequence[Branch]  # up to where it leaves the known ones
    spelt: bool  # whether the decoder gives its further tokens, and at a branch that token of the others

    def right_by(self, mix: Mix) -> bool:
        """Whether it would be answered right."""
        return self.spelt and all(branch.right_by(mix) for branch in self.branches)


def fit_mix(answers: Sequence[HeldOut]) -> Mix:
    """The mix that makes the tokens of held-out answers most probable, under a normal prior about `Mix()`.

    Whether a token is a known one, and which, are two logistic regressions with two coefficients each, where powers and
    slope are at least 0. A token within a word is easy for a decoder that cannot tell which word it is, and these
    tokens are most of them, so its power may be too large for the choice between the answers. Of `SHARES` of the power
    that one is taken with which most held-out answers are right as a whole, and of equal ones the largest.
    """
    start, doubt = np.array(Mix()), np.array(DOUBT)
    seen = [branch for answer in answers for branch in answer.branches]
    # Where one token alone can follow, nothing is chosen.
    choices = [(np.stack([b.decoder[:-1], b.head], axis=1), b.right) for b in seen if not b.unknown and len(b.head) > 1]
    either = [(np.array([[b.odds, 1.0], [0.0, 0.0]]), int(b.unknown)) for b in seen]
    decoder, head = _bounded(choices, start[:2], doubt[:2], (0, 1))
    whether = _bounded(either, start[2:], doubt[2:], (0,))
    mixes = [Mix(share * decoder, head, *whether) for share in SHARES]
    return max(mixes, key=lambda mix: sum(answer.right_by(mix) for answer in answers))


def _bounded(
    seen: Sequence[tuple[Array, int]], start: Array, doubt: Array, bounded: Sequence[int]
) -> tuple[float, float]:
    """As `_logistic` with two coefficients, of which the `bounded` ones are at least 0.

    Where the maximum is beyond a bound, the largest value of a concave function is on a bound, where the other
    coefficient is fitted anew.
    """
    found = _logistic(seen, start, doubt)
    edges = []
    for fixed in bounded:
        if min(found[place] for place in bounded) >= 0.0:
            break
        free = 1 - fixed
        alone = _logistic([(x[:, [free]], right) for x, right in seen], start[[free]], doubt[[free]])[0]
        at = np.zeros(2)
        at[free] = max(alone, 0.0) if free in bounded else alone
        edges.append(at)
    best = min(edges, key=lambda at: _loss(seen, start, doubt, at), default=found)
    return float(best[0]), float(best[1])


def _logistic(seen: Sequence[tuple[Array, int]], start: Array, doubt: Array) -> Array:
    """The coefficients [k] of inputs [m, k] that make the right one of m most probable, normal about `start`.

    The likelihood is concave, so Newton's method finds its maximum.
    """
    precision, values = 1.0 / np.square(doubt), start.copy()
    for _ in range(STEPS):
        slope, curve = precision * (values - start), np.diag(precision)
        for x, right in seen:
            scores = x @ values
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            mean = shares @ x
            slope += mean - x[right]
            curve += (x * shares[:, None]).T @ x - np.outer(mean, mean)
        move, before, size = np.linalg.solve(curve, slope), _loss(seen, start, doubt, values), 1.0
        while size > 1e-6 and _loss(seen, start, doubt, values - size * move) > before:
            size /= 2.0
        values = values - size * move
        if float(np.abs(size * move).max()) < 1e-9:
            break
    return values


def _loss(seen: Sequence[tuple[Array, int]], start: Array, doubt: Array, at: Array) -> float:
    own = sum(_log_share(x @ at, right) for x, right in seen)
    return float(0.5 * np.square((at - start) / doubt).sum() - own)


def _log_share(scores: Array, right: int) -> float:
    most = scores.max()
    return float(scores[right] - most - np.log(np.exp(scores - most).sum()))
