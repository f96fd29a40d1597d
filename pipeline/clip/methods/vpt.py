"""VPT: prompts in the image tower alone (docs/design.md 5.8)."""

from __future__ import annotations

from torch import Tensor

from pipeline.clip.methods.base import TEMPLATE, PromptLearner, Prompts, deep_vectors, vectors
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.schedule import vpt


class VPT(PromptLearner):
    """`length` image prompts for each of the first `depth` blocks (1: shallow VPT), and texts from a template.

    A block's prompts replace those of the block before; with `carry` they are added to them.
    """

    name = "vpt"

    def __init__(
        self, sizes: Sizes, length: int = 4, depth: int = 9, carry: bool = False, template: str = TEMPLATE
    ) -> None:
        super().__init__(vpt(length, depth, sizes.blocks, carry), template)
        self.visual_ctx = vectors(length, sizes.vision_width)
        self.compound_prompts_vision = deep_vectors(depth - 1, length, sizes.vision_width)

    def prompts(self, images: Tensor | None = None) -> Prompts:
        return Prompts({}, dict(enumerate([self.visual_ctx, *self.compound_prompts_vision])))
