"""A router whose state is a key that is trained with the module, as DualPrompt's (arXiv 2204.04799)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.prompts.queries import cosines, query_of
from pipeline.prompts.routers.base import Router, State, States
from pipeline.prompts.routers.mean import SAMPLES_AT_ONCE

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys

KEY = "key"  # the tensor [2 K] of a task's state


class LearnedKey(Router):
    """The cosine of a sample's query (both of its keys side by side) to each task's key.

    The module that is trained learns the key; until then the mean query of the task's samples stands in.
    """

    learned = True
    learned_in = "module"
    names: ClassVar[tuple[str, ...]] = (KEY,)

    def observe(self, keys: AnyKeys) -> State:
        return {KEY: normalize(torch.stack([part.sum(0) for part in _queries(keys)]).sum(0), dim=0)}

    def scores(self, keys: AnyKeys, states: States) -> Tensor:
        if not len(states):
            return torch.zeros(len(keys.text), 0)
        learned = states.stacked(KEY)
        return torch.cat([cosines(part, learned) for part in _queries(keys)] or [torch.zeros(0, len(states))])


def _queries(keys: AnyKeys) -> list[Tensor]:
    parts = zip(*(rows.split(SAMPLES_AT_ONCE) for rows in (keys.image, keys.text, keys.has_image)), strict=True)
    return [query_of(image, text, has_image) for image, text, has_image in parts]
