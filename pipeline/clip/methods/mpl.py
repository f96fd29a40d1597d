"""MPL, Modular Prompt Learning: image prompts are removed, added and carried from block to block.

Source: docs/design.md 5.3 to 5.6. The released code starts all projections of a block equal; in the last prompted
block, where nothing is removed later, they then stay equal for ever (M1). So each slot starts on its own here unless
`tied`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.clip.methods.base import WORDS, PromptLearner, Prompts, copies, deep_vectors, placeholders, vectors
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.schedule import First, mpl


class MPL(PromptLearner):
    """`length` text prompts per block; each makes `add` image prompts, and `remove` of the newest ones go before.

    `first` code: the first block's prompts make one image prompt each, by `proj`, as in the released code; figure: they
    make `add`, as in the paper's figure. `tied` starts the projections `txt2img_proj[slot][block - 1]` equal, as
    released. The texts read "X a photo of a <class>."; with `template_words` the first words of "a photo of a" are the
    learned ones instead, as in MaPLe.
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
