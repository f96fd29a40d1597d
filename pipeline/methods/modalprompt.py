"""ModalPrompt: one set per task, earlier sets chosen by dual-modality similarity (modalprompt.md 13)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.data.selection import NO_SET
from pipeline.methods.base import Method
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routing import (
    SAMPLES_AT_ONCE,
    provisional_prototype,
    select_for_inference,
    select_for_training,
    similarity,
)

if TYPE_CHECKING:
    from pipeline.data.keys import AnyKeys


class ModalPrompt(Method):
    """Sets are chosen per sample by similarity, in training (the current one always included) and at inference.

    Ablations of the choice (`method.selection`): "all" inserts every set in the order of the stages, "current" only
    the newest one. "oracle" is told a sample's task and gives it what that task was trained with: its own set behind
    the k - 1 most similar earlier ones; it is the upper bound of routing.
    """

    name = "modalprompt"
    learns_prototypes = True

    @property
    def needs_task(self) -> bool:
        return self.config.selection == "oracle"

    def training_sets(self, pool: PromptPool, keys: AnyKeys) -> Tensor:
        selection, samples = self.config.selection, len(keys.image)
        if not len(pool) or selection == "current":
            return torch.full((samples, 0), NO_SET, dtype=torch.long)
        if selection == "all":
            return torch.arange(len(pool)).repeat(samples, 1)
        weight, gate = self.config.image_weight, self.config.gate
        prototypes, own = pool.prototypes.cpu(), None
        if gate is not None:
            own = provisional_prototype(keys.image, keys.text, keys.has_image)[None]
        parts = []
        # In parts: the similarities of a million samples to a thousand tasks would take gigabytes at once.
        for image, text, has_image in zip(
            *(part.split(SAMPLES_AT_ONCE) for part in (keys.image, keys.text, keys.has_image)), strict=True
        ):
            scores = similarity(image, text, prototypes, weight, has_image)
            reference = None if own is None else similarity(image, text, own, weight, has_image)[:, 0]
            parts.append(select_for_training(scores, self.config.k, gate, reference))
        return torch.cat(parts)

    def evaluation_sets(self, pool: PromptPool, task: int, scores: Tensor) -> Tensor:
        k, gate, samples = self.config.k, self.config.gate, len(scores)
        if self.config.selection == "all":
            return torch.arange(len(pool)).repeat(samples, 1)
        if self.config.selection == "current":
            return torch.full((samples, 1), len(pool) - 1, dtype=torch.long)
        if self.config.selection == "oracle":
            earlier = select_for_training(scores[:, :task], k, gate, reference=scores[:, task])
            return _own_set_last(earlier, task)
        return select_for_inference(scores, k, gate)


def _own_set_last(earlier: Tensor, own: int) -> Tensor:
    """Each row's earlier sets [N, m] with the set `own` behind them and the unused places behind that, [N, m + 1]."""
    joined = torch.cat([earlier, earlier.new_full((len(earlier), 1), own)], dim=1)
    order = (joined == NO_SET).to(torch.int8).sort(dim=1, stable=True).indices
    return torch.gather(joined, 1, order)
