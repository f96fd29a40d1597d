"""A selection rule: the two sets that are most similar to a sample, each weighted by its similarity."""

from __future__ import annotations

from torch import Tensor

from pipeline.data.selection import Selection
from pipeline.prompts.rules import Rule


class NearestTwo(Rule):
    """The nearest set counts in full, the second by its share of the nearest one's similarity."""

    compares = True  # it looks at the scores

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        best = scores.topk(self.most(scores.shape[1]), dim=1)  # [N, m], most similar first
        shares = (best.values / best.values[:, :1].clamp_min(1e-6)).clamp(0.0, 1.0)
        shares[:, 0] = 1.0  # also where no similarity is positive
        return Selection(best.indices.flip(1), shares.flip(1).float())  # least similar first

    def most(self, modules: int) -> int:
        return min(2, modules)
