"""How the probabilities of known answers and those of a decoder's next token are multiplied.

The known answers form a tree of tokens. Where an answer in progress is the beginning of some of them, their next tokens
get the decoder's and the head's probabilities, each to a power; all others get the decoder's and a factor. The two
powers and the factor are fitted to held-out samples (`fit_mix`), so a head that tells nothing changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

DOUBT = (1.0, 1.0, 4.0)  # deviations of the fitted values from those of the decoder alone: the strength of their prior
STEPS = 100  # of Newton's method
LEAST_LOG = -80.0  # of a probability that counts


class Mix(NamedTuple):
    """How the two are multiplied: powers of the decoder's and the head's, and the logarithm of the others' factor."""

    decoder: float = 1.0
    head: float = 0.0
    other: float = 0.0


class Weighing:
    """What a head says of one sample, for the decoder of its answer."""

    def __init__(self, tokens: Sequence[Sequence[int]], logs: npt.NDArray[np.float32], mix: Mix) -> None:
        """`tokens` of C known answers, the logarithms of their probabilities [C], and how these count."""
        self._tokens, self._logs, self._mix = tokens, logs, mix

    def __call__(self, so_far: Sequence[int], scores: Tensor) -> Tensor:
        """Logits [V] of the token behind those `so_far`, given the decoder's [V], in float32.

        They are the decoder's own where no known answer begins so.
        """
        found = self.next(so_far)
        if found is None:
            return scores
        logs = log_softmax(scores.float(), dim=0)
        tokens = torch.from_numpy(found[0]).to(logs.device)
        own = logs[tokens].clamp_min(LEAST_LOG)
        others = logs.index_fill(0, tokens, -torch.inf)
        together = others.logsumexp(0).clamp_min(LEAST_LOG)
        mixed = others + (self._mix.decoder - 1.0) * together + self._mix.other
        said = torch.from_numpy(found[1]).to(logs)
        return mixed.index_copy(0, tokens, self._mix.decoder * own + self._mix.head * said)

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
    """One token of a held-out answer: what decoder and head say of the tokens that known answers have there."""

    decoder: npt.NDArray[np.float64]  # [m + 1] logarithms; the last of all other tokens together
    head: npt.NDArray[np.float64]  # [m]
    right: int  # which of the m + 1 it is


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
    """The mix that makes held-out tokens most probable, under a normal prior about the decoder alone, `Mix()`.

    The likelihood is that of a logistic regression with three coefficients, so concave, and Newton's method finds its
    maximum. Powers are at least 0.
    """
    start, precision = np.array(Mix()), 1.0 / np.square(DOUBT)
    values = start.copy()
    inputs = [_inputs(branch) for branch in seen]

    def loss(at: npt.NDArray[np.float64]) -> float:
        own = sum(_log_share(x @ at, branch.right) for x, branch in zip(inputs, seen, strict=True))
        return float(0.5 * (precision * (at - start) ** 2).sum() - own)

    for _ in range(STEPS):
        slope, curve = precision * (values - start), np.diag(precision)
        for x, branch in zip(inputs, seen, strict=True):
            scores = x @ values
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            mean = shares @ x
            slope += mean - x[branch.right]
            curve += (x * shares[:, None]).T @ x - np.outer(mean, mean)
        move, before, size = np.linalg.solve(curve, slope), loss(values), 1.0
        while size > 1e-6 and loss(values - size * move) > before:
            size /= 2.0
        values = values - size * move
        if float(np.abs(size * move).max()) < 1e-9:
            break
    values[:2] = np.maximum(values[:2], 0.0)
    return Mix(*values.tolist())


def rows_of(tokens: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Answers' tokens as a head has them."""
    return tuple(tuple(row) for row in tokens)


def _inputs(branch: Branch) -> npt.NDArray[np.float64]:
    """What the three coefficients of a branch's m + 1 tokens multiply [m + 1, 3]."""
    found = np.zeros((len(branch.decoder), 3))
    found[:, 0], found[:-1, 1], found[-1, 2] = branch.decoder, branch.head, 1.0
    return found


def _log_share(scores: npt.NDArray[np.float64], right: int) -> float:
    most = scores.max()
    return float(scores[right] - most - np.log(np.exp(scores - most).sum()))
