"""MaPLe: deep text prompts, each mapped linearly to the image prompt of its block (docs/design.md 5.7)."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.clip.methods.base import WORDS, PromptLearner, Prompts, copies, deep_vectors, placeholders, vectors
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.schedule import maple


class MaPLe(PromptLearner):
    """`length` prompts in each tower, replaced before each of the first `depth` blocks.

    The text prompts are parameters. `proj` maps those of the first block to image prompts,
    `compound_prompt_projections` those of the deeper blocks.
    """

    name = "maple"

    def __init__(self, sizes: Sizes, length: int = 2, depth: int = 9, words: str | None = WORDS) -> None:
        super().__init__(maple(length, depth, sizes.blocks), f"{words or placeholders(length)} {{}}.", length)
        self.words = words
        self.ctx = vectors(length, sizes.text_width)
        self.proj = nn.Linear(sizes.text_width, sizes.vision_width)
        self.compound_prompts_text = deep_vectors(depth - 1, length, sizes.text_width)
        self.compound_prompt_projections = copies(nn.Linear(sizes.text_width, sizes.vision_width), depth - 1)

    def start_words(self) -> str | None:
        return self.words

    def prompts(self, images: Tensor | None = None) -> Prompts:
        text = [self.ctx, *self.compound_prompts_text]
        couplings = [self.proj, *self.compound_prompt_projections]
        vision = [coupling(prompt) for coupling, prompt in zip(couplings, text, strict=True)]
        return Prompts(dict(enumerate(text)), dict(enumerate(vision)))
