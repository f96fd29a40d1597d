"""How good the scores of a router are: ranks of the own task, calibration of probabilities, foreign samples told."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15  # of confidence, for the calibration error
OWN_REJECTED = 0.01  # share of own samples that may be rejected where foreign ones are counted


def own_ranks(scores: Tensor, own: Tensor | int) -> Tensor:
    """The place [N] of the own task among all, 1 for the best; of equal scores the earlier task is the better one.

    `scores` [N, T], `own` [N] or one number for all.
    """
    number = torch.as_tensor(own).expand(len(scores))[:, None]
    mine = scores.gather(1, number)
    earlier = torch.arange(scores.shape[1]) < number
    return 1 + ((scores > mine) | ((scores == mine) & earlier)).sum(1)


def calibration_error(confidence: Tensor, right: Tensor, weights: Tensor) -> float:
    """The expected calibration error: |accuracy - confidence| of equal intervals of confidence, weighted.

    `confidence` [N] probabilities of the best task, `right` [N] whether it is the own one, `weights` [N].
    """
    weights = weights.double() / weights.double().sum()
    place = (confidence.double() * BINS).long().clamp_(0, BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.double).index_add_(0, place, weights * (right.double() - confidence.double()))
    return float(gaps.abs().sum())


def auroc(foreign: Tensor, own: Tensor) -> float:
    """The probability that a foreign sample is stranger than an own one, of the strangenesses [F] and [O]; ties count
    half. 1: every foreign sample is stranger than every own one; 0.5: by chance.
    """
    ranked, values = own.double().sort().values, foreign.double()
    below = torch.searchsorted(ranked, values, right=False)  # own samples that are less strange
    until = torch.searchsorted(ranked, values, right=True)
    return float((below + until).double().mean()) / (2 * len(ranked))


def rejected(foreign: Tensor, own: Tensor, share: float = OWN_REJECTED) -> float:
    """The share of foreign samples that is rejected with the threshold that rejects `share` of the own ones."""
    return float((foreign.double() > torch.quantile(own.double(), 1 - share)).double().mean())


def percent(share: float) -> float:
    """A share in percent, rounded."""
    return round(100 * share, 3)
