"""Further terms of the loss, beside the language model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from pipeline.prompts.routers.mean import prototype_term_weights

if TYPE_CHECKING:
    from pipeline.data.collate import Batch
    from pipeline.training.normaliser import Normaliser


class Term:
    """An addition to the loss: the sum of what `losses` gives, times `weight`."""

    names: ClassVar[tuple[str, ...]]

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def losses(self, parts: nn.ModuleDict, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, ...]:
        """This micro-batch's share of each of the `names`, computed with the learner's `parts`.

        The same modules run on every rank, whatever the micro-batch holds.
        """
        raise NotImplementedError


class PrototypeTerm(Term):
    """ModalPrompt's: the mean of 1 - cos(key, prototype) for both keys (docs/design.md 4.8)."""

    names = ("loss_image", "loss_text")

    def losses(self, parts: nn.ModuleDict, batch: Batch, normaliser: Normaliser) -> tuple[Tensor, ...]:
        prompt, _ = parts["module"]()
        prototype = parts["head"](prompt).float()[None]
        image_weight, text_weight = prototype_term_weights(batch.has_image)
        image = 1.0 - cosine_similarity(batch.image_key, prototype, dim=-1)
        text = 1.0 - cosine_similarity(batch.text_key, prototype, dim=-1)
        sums = (image * image_weight * batch.weights).sum(), (text * text_weight * batch.weights).sum()
        return tuple(found / max(normaliser.samples, 1.0) for found in sums)
