"""Whether a sample resembles the kept keys of its task at all (docs/routing.md).

Scores say which task fits best, not whether any does. The Mahalanobis distance to the kept keys of the task that a
sample is routed to does, for every router, and is a function of that task's keys alone.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.keys import AnyKeys, Keys
from pipeline.prompts.routers.kept_keys import keys_of, picked, sampled_rows
from pipeline.prompts.routers.key_features import side_by_side
from pipeline.prompts.routers.states import State, States

OUTSIDE = 0.01  # share of a task's own samples that its threshold leaves out
SHRUNK = 0.03  # of the mean variance is added to the variance of every direction
FEWEST = 8  # kept keys without which a task has no threshold
MOST = 512  # kept keys that a spread is made of: its cost grows with their square
SAME_PICTURE = 3e-3  # distance of image keys of length 1, from their rounding and from batches of other sizes
HELD = 16  # spreads in memory at once: 1.6 MB each with 128 keys of CLIP-L's width


@dataclass(frozen=True)
class Spread:
    """How the n kept keys of a task are spread around their mean, in float64.

    Keys are u = [g_v; g_x; no image] [F]. Their scatter X^T X + s I [F, F] is never made: by Woodbury's identity
    distances need the n x n products of the keys alone.
    """

    mean: Tensor  # [F]
    centred: Tensor  # X [n, F]
    factor: Tensor  # the Cholesky factor of X X^T + s I [n, n]
    added: float  # s
    threshold: float  # the distance that all but `OUTSIDE` of the task's samples stay below

    @classmethod
    def of(cls, state: State) -> Spread:
        """That of at most `MOST` of a task's kept keys."""
        kept = keys_of(state)
        sample = picked(kept, sampled_rows(len(kept.text), MOST))
        keys = side_by_side(sample).double().cpu()
        mean = keys.mean(0)
        centred, count = keys - mean, len(keys)
        added = max(SHRUNK * float(centred.square().sum()) / keys.shape[1], 1e-6)
        products = centred @ centred.T  # [n, n]
        factor = torch.linalg.cholesky(products + added * torch.eye(count, dtype=torch.float64))
        spread = cls(mean, centred, factor, added, float("inf"))
        if count < FEWEST:
            return spread
        # Each key's distance to the others, from its distance to all (Sherman and Morrison).
        inside, factor_left = spread.distances(keys) / count, count / (count - 1)
        held_out = count * factor_left**2 * inside / (1.0 - factor_left * inside).clamp_min(1e-9)
        # Questions about one picture share its key, so a key whose picture is kept again is left out with those of its
        # picture: the pictures of later questions are others.
        pictures = _pictures(sample)
        for picture in pictures.unique().tolist():
            of_it = pictures == picture
            if 1 < int(of_it.sum()) <= count - FEWEST:
                held_out[of_it] = _distances_left_out(products, of_it, added)
        return cls(mean, centred, factor, added, float(torch.quantile(held_out, 1.0 - OUTSIDE)))

    def distances(self, keys: Tensor) -> Tensor:
        """Squared Mahalanobis distances [B] of samples u [B, F]: n d^T (X^T X + s I)^-1 d."""
        apart = keys.double() - self.mean
        inner = torch.linalg.solve_triangular(self.factor, self.centred @ apart.T, upper=False)
        return len(self.centred) / self.added * (apart.square().sum(1) - inner.square().sum(0))


def _pictures(keys: Keys) -> Tensor:
    """The number of each sample's picture [n], by its key; a sample without a picture has a number of its own."""
    image = torch.nn.functional.normalize(keys.image.double().cpu(), dim=1)
    same = torch.cdist(image, image) < SAME_PICTURE
    shown = keys.has_image.cpu()
    same = (same & shown & shown[:, None]) | torch.eye(len(shown), dtype=torch.bool)
    return same.int().argmax(1)  # the first of the same


def _distances_left_out(products: Tensor, left_out: Tensor, added: float) -> Tensor:
    """Squared distances [m] of m keys to the other ones of a task, of which they are no part.

    Args:
        products: X X^T of all n keys [n, n].
        left_out: which ones the m keys are [n].
        added: s of `Spread`.
    """
    others = products[~left_out][:, ~left_out]  # [n - m, n - m]
    across = products[~left_out][:, left_out]  # [n - m, m]
    middle = others.mean(0)
    # Products of the differences from the mean of the others.
    spread = others - middle - middle[:, None] + middle.mean()
    apart = across - across.mean(0) - middle[:, None] + middle.mean()
    lengths = products.diagonal()[left_out] - 2.0 * across.mean(0) + middle.mean()
    factor = torch.linalg.cholesky(spread + added * torch.eye(len(spread), dtype=spread.dtype))
    inner = torch.linalg.solve_triangular(factor, apart, upper=False)
    return len(products) / added * (lengths - inner.square().sum(0))


def unfamiliar(keys: AnyKeys, states: States, tasks: Tensor) -> Tensor:
    """Whether each of N samples is farther from the kept keys of its task [N] than nearly all of them are."""
    spreads: OrderedDict[int, Spread] = states.once("spreads", OrderedDict)
    strange = torch.zeros(len(tasks), dtype=torch.bool)
    for task in tasks.unique().tolist():
        if task not in spreads:
            spreads[task] = Spread.of(states[task])
        spreads.move_to_end(task)
        while len(spreads) > HELD:
            spreads.popitem(last=False)
        spread = spreads[task]
        for rows in (tasks == task).nonzero()[:, 0].split(1 << 13):
            strange[rows] = spread.distances(side_by_side(picked(keys, rows))) > spread.threshold
    return strange
