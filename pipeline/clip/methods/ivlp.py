"""IVLP: independent prompts in both towers (docs/design.md 5.8)."""

from __future__ import annotations

from torch import Tensor

from pipeline.clip.methods.base import WORDS, PromptLearner, Prompts, deep_vectors, placeholders, vectors
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.schedule import ivlp


class IVLP(PromptLearner):
    """`length` text and `length_vision` image prompts for each of the first `depth` blocks, replaced in each block.

    With `pipeline.clip.methods.regularisers.Consistency` and `pipeline.clip.learning.averaging` this is PromptSRC
    (docs/design.md 5.9).
    """

    name = "ivlp"

    def __init__(
        self, sizes: Sizes, length: int = 4, length_vision: int = 4, depth: int = 9, words: str | None = WORDS
    ) -> None:
        blocks = ivlp(length, length_vision, depth, sizes.blocks)
        super().__init__(blocks, f"{words or placeholders(length)} {{}}.", length)
        self.words = words
        self.ctx = vectors(length, sizes.text_width)
        self.compound_prompts_text = deep_vectors(depth - 1, length, sizes.text_width)
        self.visual_ctx = vectors(length_vision, sizes.vision_width)
        self.compound_prompts_vision = deep_vectors(depth - 1, length_vision, sizes.vision_width)

    def start_words(self) -> str | None:
        return self.words

    def prompts(self, images: Tensor | None = None) -> Prompts:
        text = dict(enumerate([self.ctx, *self.compound_prompts_text]))
        return Prompts(text, dict(enumerate([self.visual_ctx, *self.compound_prompts_vision])))
