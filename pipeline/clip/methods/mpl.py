"""MPL, Modular Prompt Learning: image prompts are removed, added and carried from block to block (docs/design.md 5.4).

The released code initialises all projections of a block as copies of one. In the last prompted block they receive equal
gradients and stay equal (docs/design.md 5.6, M1). Here each has its own initial values unless `tied`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.clip.methods.base import WORDS, PromptLearner, Prompts, copies, deep_vectors, placeholders, vectors
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.schedule import First, mpl


class MPL(PromptLearner):
    """Text prompts per block, each mapped to image prompts that are added to those of the blocks before.

    Args:
        sizes: sizes of the backbone.
        length: n, the number of text prompts per block.
        add: the number of image prompts that each text prompt is mapped to, by `txt2img_proj[slot][block - 1]`.
        remove: the number of the newest image prompts that are removed before each block.
        depth: the number of prompted blocks.
        first: image prompts per text prompt in the first block: code: one, by `proj`, as in the released code; figure:
            `add`, as in the paper's figure.
        tied: initialise the projections of a block as copies of one, as released.
        template_words: learn the first words of "a photo of a <class>.", as MaPLe does, instead of prompts before it,
            "X a photo of a <class>.".
    """

    name = "mpl"

    def __init__(
        self,
        sizes: Sizes,
        length: int = 1,
        add: int = 2,
        remove: int = 1,
        depth: int = 9,
        first: First = "code",
        tied: bool = False,
        template_words: bool = False,
    ) -> None:
        context = WORDS if template_words else f"{placeholders(length)} {WORDS}"
        super().__init__(mpl(length, add, remove, depth, sizes.blocks, first), f"{context} {{}}.", length)
        self.words = context
        self.ctx = vectors(length, sizes.text_width)

        def coupling() -> nn.Linear:
            return nn.Linear(sizes.text_width, sizes.vision_width)

        start = add if first == "figure" else 1
        shared = coupling()
        if first == "code":
            self.proj: nn.Module = coupling()
        else:
            self.proj = copies(shared, start) if tied else nn.ModuleList([coupling() for _ in range(start)])
        self.compound_prompts_text = deep_vectors(depth - 1, length, sizes.text_width)
        self.txt2img_proj = nn.ModuleList(
            copies(shared, depth - 1) if tied else nn.ModuleList([coupling() for _ in range(depth - 1)])
            for _ in range(add)
        )

    def start_words(self) -> str | None:
        return self.words

    def prompts(self, images: Tensor | None = None) -> Prompts:
        first = self.proj if isinstance(self.proj, nn.ModuleList) else [self.proj]
        vision = {0: torch.cat([coupling(self.ctx) for coupling in first])}
        for block, prompt in enumerate(self.compound_prompts_text, start=1):
            slots = [projections[block - 1](prompt) for projections in self.txt2img_proj]  # type: ignore[index]
            vision[block] = torch.cat(slots)  # [add * n, D]
        return Prompts(dict(enumerate([self.ctx, *self.compound_prompts_text])), vision)
