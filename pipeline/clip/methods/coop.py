"""CoOp: a learned context around the class name (docs/design.md 5.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.clip.methods.base import DEVIATION, PromptLearner, Prompts, placeholders
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.schedule import coop
from pipeline.clip.towers.text import Position
from pipeline.errors import UserError


class CoOp(PromptLearner):
    """Learned context vectors `ctx` around the class name.

    Args:
        sizes: sizes of the backbone.
        length: n, the number of context vectors.
        position: the class name comes after the context (end), between its halves (middle) or before it (front).
        classes: K for class-specific contexts `ctx` [K, n, D]; None for one context [n, D] shared by all classes.
        words: words whose embeddings are the initial context, such as "a photo of a"; None: random initial values.
    """

    name = "coop"
    takes_classes = True

    def __init__(
        self,
        sizes: Sizes,
        length: int = 16,
        position: Position = "end",
        classes: int | None = None,
        words: str | None = None,
    ) -> None:
        super().__init__(coop(length, sizes.blocks), f"{words or placeholders(length)} {{}}.", length)
        if classes is not None and words is not None:
            raise UserError(
                f"A context of its own for each class cannot start from the words '{words}'. Leave out the words, or "
                "share the context."
            )
        self.position, self.words = position, words
        shape = (length, sizes.text_width) if classes is None else (classes, length, sizes.text_width)
        self.ctx = nn.Parameter(torch.empty(shape).normal_(std=DEVIATION))

    @property
    def classes(self) -> int | None:
        return len(self.ctx) if self.ctx.dim() == 3 else None

    def start_words(self) -> str | None:
        return self.words

    def prompts(self, images: Tensor | None = None) -> Prompts:
        return Prompts({0: self.ctx}, {})
