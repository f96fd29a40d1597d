"""A CLIP method: a context of one learned vector, which stands at several positions before the class name."""

from __future__ import annotations

from torch import Tensor

from pipeline.clip.methods.base import PromptLearner, Prompts, placeholders, vectors
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.schedule import coop


class OneWord(PromptLearner):
    """CoOp whose `length` positions share one vector `ctx` [1, D]."""

    name = "one_word"

    def __init__(self, sizes: Sizes, length: int = 4) -> None:
        super().__init__(coop(length, sizes.blocks), f"{placeholders(length)} {{}}.", length)
        self.ctx = vectors(1, sizes.text_width)

    def prompts(self, images: Tensor | None = None) -> Prompts:
        return Prompts({0: self.ctx.expand(self.length, -1)}, {})
