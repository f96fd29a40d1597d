"""A router: a sample belongs to a task as far as its image or its question says so, whichever says it more clearly."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.data.keys import AnyKeys, Rows
from pipeline.prompts.routers import Router, State, States

AT_ONCE = 1 << 14  # rows of keys that are in memory as float32


class BestKey(Router):
    """The larger of two cosines: image key to the mean image key of a task, text key to its mean text key."""

    def observe(self, keys: AnyKeys) -> State:
        return {"image": centre(keys.image, keys.has_image), "text": centre(keys.text)}  # [K] each

    def scores(self, keys: AnyKeys, states: States) -> Tensor:
        if not len(states):
            return torch.zeros(len(keys.text), 0)
        image = cosines(keys.image, states.stacked("image")).masked_fill(~keys.has_image.bool()[:, None], -1.0)
        return torch.maximum(image, cosines(keys.text, states.stacked("text")))  # [N, T]


def centre(rows: Rows, counted: Tensor | None = None) -> Tensor:
    """The mean direction [K] of keys [N, K], of those that are `counted` [N]."""
    flags = torch.ones(len(rows)) if counted is None else counted.float()
    parts = zip(rows.split(AT_ONCE), flags.split(AT_ONCE), strict=True)
    sums = [(normalize(part.float(), dim=-1) * flag[:, None]).sum(0) for part, flag in parts]
    return normalize(torch.stack(sums).sum(0), dim=-1)


def cosines(rows: Rows, centres: Tensor) -> Tensor:
    """Of keys [N, K] to the unit vectors [T, K]: [N, T]."""
    return torch.cat([normalize(part.float(), dim=-1) @ centres.T for part in rows.split(AT_ONCE)])
