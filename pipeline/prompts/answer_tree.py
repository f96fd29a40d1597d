"""How the probabilities of known answers and those of a decoder's next token are multiplied.

The known answers form a tree of tokens. Where an answer in progress is the beginning of some of them, `Weighing` asks
two questions: whether it goes on as one of them, which the decoder's probability of their next tokens says, and as
which, which decoder and head say together. How much each counts is fitted to held-out samples (`fit_mix`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

STEPS = 100  # of Newton's method
LEAST_LOG = -80.0  # of a probability that counts
Array = npt.NDArray[np.float64]


class Mix(NamedTuple):
    """How decoder and head count, for known tokens c with the decoder's p_c and the head's q_c, and S = sum_c p_c.

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


class AnswerTree:
    """The tokens of known answers as a tree, of which only what answers in progress came to is made."""

    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        """`tokens` of C answers."""
        self._tokens, self._root = tokens, _Node.of(tokens, range(len(tokens)), 0)

    def at(self, so_far: Sequence[int]) -> _Node | None:
        """What is known of the answers that begin so; None where none of them goes on."""
        node = self._root
        for depth, token in enumerate(so_far):
            if node is None or token not in node.behind:
                return None
            if node.behind[token] is None:
                begun = (n for n in node.begun.tolist() if self._tokens[n][depth] == token)
                node.behind[token] = _Node.of(self._tokens, begun, depth + 1)
            node = node.behind[token]
        return node


@dataclass(frozen=True)
class _Node:
    """The known answers with one beginning that go on behind it."""

    begun: npt.NDArray[np.int64]  # [n] their numbers
    next: npt.NDArray[np.int64]  # [m] their next tokens, in ascending order
    places: npt.NDArray[np.int64]  # [n] which of these each has
    behind: dict[int, _Node | None]  # by next token; None: not made yet, or no answer goes on

    @classmethod
    def of(cls, tokens: Sequence[Sequence[int]], numbers: Iterable[int], length: int) -> _Node | None:
        """That of the answers of these numbers, whose first `length` tokens are the same; None where none goes on."""
        begun = [number for number in numbers if len(tokens[number]) > length]
        if not begun:
            return None
        following, places = np.unique([tokens[number][length] for number in begun], return_inverse=True)
        return cls(np.array(begun), following, places, dict.fromkeys(following.tolist()))


class Weighing:
    """What a head says of one sample, for the decoder of its answer."""

    def __init__(self, tree: AnswerTree, logs: npt.NDArray[np.float32], mix: Mix) -> None:
        """The `tree` of C known answers, the logarithms of their probabilities [C], and how these count."""
        self._tree, self._logs, self._mix = tree, logs, mix

    @classmethod
    def weighed(cls, rows: Sequence[Weighing], so_far: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """The logits [n, V] of the tokens behind those `so_far` of n answers, given the decoder's [n, V].

        Those of a row are the decoder's where no known answer begins so, and else have the same sum of exponentials,
        because rules of generation such as a repetition penalty count logits as they are.
        """
        found = [(place, next_) for place, row in enumerate(rows) if (next_ := row.next(so_far[place])) is not None]
        if not found:
            return scores
        places = [place for place, _ in found]
        mix = torch.tensor([rows[place]._mix for place in places]).to(scores.device)[:, :, None]
        decoder, head, slope, known = (mix[:, place] for place in range(4))
        # Rows of fewer tokens are filled up with their first one, which counts once.
        shape = len(found), max(len(tokens) for _, (tokens, _) in found)
        filled, padded = np.empty(shape, dtype=np.int64), np.full(shape, -np.inf, dtype=np.float32)
        for row, (_, (some, logs)) in enumerate(found):
            filled[row], filled[row, : len(some)], padded[row, : len(logs)] = some[0], some, logs
        tokens, said = torch.from_numpy(filled).to(scores.device), torch.from_numpy(padded).to(scores.device)
        gaps = said.isinf()
        mine = (scores if len(found) == len(rows) else scores[places]).float()
        total = mine.logsumexp(1, keepdim=True)
        own = (mine.gather(1, tokens) - total).clamp_min(LEAST_LOG).masked_fill(gaps, -torch.inf)
        changed = mine.scatter(1, tokens, -torch.inf)
        together = (changed.logsumexp(1, keepdim=True) - total).clamp_min(LEAST_LOG)
        odds = slope * (own.logsumexp(1, keepdim=True) - together) + known
        powers = (decoder * own.masked_fill(gaps, 0.0) + head * said.masked_fill(gaps, 0.0)).masked_fill(
            gaps, -torch.inf
        )
        shares = log_softmax(powers, dim=1) + logsigmoid(odds) + total
        shares = torch.where(gaps, shares[:, :1], shares)
        changed = changed.add_(logsigmoid(-odds) - together).scatter_(1, tokens, shares).to(scores.dtype)
        if len(found) == len(rows):
            return changed
        return scores.index_copy(0, torch.tensor(places, device=scores.device), changed)

    def next(self, so_far: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None:
        """The tokens [m] that follow in the known answers which begin so, in ascending order, and the logarithms of
        their probabilities [m]; None where there is none."""
        node = self._tree.at(so_far)
        if node is None:
            return None
        logs = self._logs[node.begun]
        shares = np.bincount(node.places, np.exp(logs - logs.max()))
        return node.next, np.log(np.maximum(shares / shares.sum(), np.exp(LEAST_LOG))).astype(np.float32)


@dataclass(frozen=True)
class Branch:
    """One token of a held-out answer: what decoder and head say of the m tokens that known answers have there."""

    decoder: Array  # [m + 1] logarithms; the last of all other tokens together
    head: Array  # [m]
    right: int  # which of the m + 1 it is

    @property
    def odds(self) -> float:
        """The logarithm of the decoder's odds that it is one of the known tokens."""
        return float(np.logaddexp.reduce(self.decoder[:-1]) - self.decoder[-1])


def branches(weighing: Weighing, answer: Sequence[int], logits: Tensor) -> Iterator[Branch]:
    """The branches along a held-out answer of n tokens, whose logits [n, V] the decoder gave; up to where it leaves the
    known ones."""
    for place, token in enumerate(answer):
        found = weighing.next(answer[:place])
        if found is None:
            return
        logs = log_softmax(logits[place].float(), dim=0)
        tokens = torch.from_numpy(found[0]).to(logs.device)
        others = logs.index_fill(0, tokens, -torch.inf).logsumexp(0, keepdim=True)
        said = torch.cat([logs[tokens], others]).clamp_min(LEAST_LOG).double().cpu().numpy()
        right = np.flatnonzero(found[0] == token)
        yield Branch(said, found[1].astype(np.float64), int(right[0]) if len(right) else len(found[0]))
        if not len(right):
            return


def fit_mix(seen: Sequence[Branch]) -> Mix:
    """The mix that makes held-out tokens most probable, under a normal prior about `Mix()`.

    Whether a token is a known one, and which, are two logistic regressions with two coefficients each, where powers and
    slope are at least 0.
    """
    start, doubt = np.array(Mix()), np.array(DOUBT)
    known = [branch for branch in seen if branch.right < len(branch.head)]
    # Where one token alone can follow, nothing is chosen.
    choices = [(np.stack([b.decoder[:-1], b.head], axis=1), b.right) for b in known if len(b.head) > 1]
    either = [(np.array([[b.odds, 1.0], [0.0, 0.0]]), int(b.right == len(b.head))) for b in seen]
    which = _bounded(choices, start[:2], doubt[:2], (0, 1))
    whether = _bounded(either, start[2:], doubt[2:], (0,))
    return Mix(*which, *whether)


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
