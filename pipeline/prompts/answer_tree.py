"""How the probabilities of known answers and those of a decoder's next token are multiplied.

The known answers form a tree of tokens. Where an answer in progress is the beginning of some of them, `Weighing` asks
two questions: whether it goes on as one of them, which the decoder's probability of their next tokens says, and as
which, which decoder and head say together. How much each counts is fitted to held-out samples (`fit_mix`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


class Weighing:
    """What a head says of one sample, for the decoder of its answer."""

    def __init__(self, tokens: Sequence[Sequence[int]], logs: npt.NDArray[np.float32], mix: Mix) -> None:
        """`tokens` of C known answers, the logarithms of their probabilities [C], and how these count."""
        self._tokens, self._logs, self._mix = tokens, logs, mix

    @classmethod
    def weighed(cls, rows: Sequence[Weighing], so_far: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
        """Log-probabilities [n, V] of the tokens behind those `so_far` of n answers, given the decoder's logits [n, V].

        They are the decoder's logits where no known answer begins so.
        """
        found = [(place, next_) for place, row in enumerate(rows) if (next_ := row.next(so_far[place])) is not None]
        if not found:
            return scores
        places = [place for place, _ in found]
        mix = torch.tensor([rows[place]._mix for place in places]).to(scores.device)[:, :, None]
        decoder, head, slope, known = (mix[:, place] for place in range(4))
        # Rows of fewer tokens are filled up with their first one, which counts once.
        width = max(len(tokens) for _, (tokens, _) in found)
        filled = np.stack(
            [np.pad(tokens, (0, width - len(tokens)), constant_values=tokens[0]) for _, (tokens, _) in found]
        )
        padded = [np.pad(logs, (0, width - len(logs)), constant_values=-np.inf) for _, (_, logs) in found]
        tokens, said = torch.from_numpy(filled).to(scores.device), torch.from_numpy(np.stack(padded)).to(scores.device)
        gaps = said.isinf()
        logs = log_softmax(scores[places].float(), dim=1)
        own = logs.gather(1, tokens).clamp_min(LEAST_LOG).masked_fill(gaps, -torch.inf)
        others = logs.scatter(1, tokens, -torch.inf)
        together = others.logsumexp(1, keepdim=True).clamp_min(LEAST_LOG)
        odds = slope * (own.logsumexp(1, keepdim=True) - together) + known
        powers = (decoder * own.masked_fill(gaps, 0.0) + head * said.masked_fill(gaps, 0.0)).masked_fill(
            gaps, -torch.inf
        )
        shares = log_softmax(powers, dim=1) + logsigmoid(odds)
        shares = torch.where(gaps, shares[:, :1], shares)
        changed = (others - together + logsigmoid(-odds)).scatter(1, tokens, shares)
        return scores.index_copy(0, torch.tensor(places, device=scores.device), changed.to(scores.dtype))

    def next(self, so_far: Sequence[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None:
        """The tokens [m] that follow in the known answers which begin so, in ascending order, and the logarithms of
        their probabilities [m]; None where there is none."""
        length, beginning = len(so_far), tuple(so_far)
        begun = [n for n, row in enumerate(self._tokens) if len(row) > length and row[:length] == beginning]
        if not begun:
            return None
        tokens, places = np.unique([self._tokens[n][length] for n in begun], return_inverse=True)
        logs = self._logs[begun]
        shares = np.bincount(places, np.exp(logs - logs.max()))
        return tokens, np.log(np.maximum(shares / shares.sum(), np.exp(LEAST_LOG))).astype(np.float32)


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

    Whether a token is a known one, and which, are two logistic regressions with two coefficients each. Powers and slope
    are at least 0.
    """
    start, doubt = np.array(Mix()), np.array(DOUBT)
    known = [branch for branch in seen if branch.right < len(branch.head)]
    # Where one token alone can follow, nothing is chosen.
    choices = [(np.stack([b.decoder[:-1], b.head], axis=1), b.right) for b in known if len(b.head) > 1]
    either = [(np.array([[b.odds, 1.0], [0.0, 0.0]]), int(b.right == len(b.head))) for b in seen]
    which = _logistic(choices, start[:2], doubt[:2])
    whether = _logistic(either, start[2:], doubt[2:])
    return Mix(max(which[0], 0.0), max(which[1], 0.0), max(whether[0], 0.0), whether[1])


def rows_of(tokens: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Answers' tokens as a head has them."""
    return tuple(tuple(row) for row in tokens)


def _logistic(seen: Sequence[tuple[Array, int]], start: Array, doubt: Array) -> list[float]:
    """The coefficients [k] of inputs [m, k] that make the right one of m most probable, normal about `start`.

    The likelihood is concave, so Newton's method finds its maximum.
    """
    precision, values = 1.0 / np.square(doubt), start.copy()

    def loss(at: Array) -> float:
        own = sum(_log_share(x @ at, right) for x, right in seen)
        return float(0.5 * (precision * (at - start) ** 2).sum() - own)

    for _ in range(STEPS):
        slope, curve = precision * (values - start), np.diag(precision)
        for x, right in seen:
            scores = x @ values
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            mean = shares @ x
            slope += mean - x[right]
            curve += (x * shares[:, None]).T @ x - np.outer(mean, mean)
        move, before, size = np.linalg.solve(curve, slope), loss(values), 1.0
        while size > 1e-6 and loss(values - size * move) > before:
            size /= 2.0
        values = values - size * move
        if float(np.abs(size * move).max()) < 1e-9:
            break
    return [float(value) for value in values]


def _log_share(scores: Array, right: int) -> float:
    most = scores.max()
    return float(scores[right] - most - np.log(np.exp(scores - most).sum()))
