"""CoCoOp: a small network of the image feature shifts the context (docs/design.md 5.2)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from pipeline.clip.methods.base import WORDS, PromptLearner, Prompts, placeholders, vectors
from pipeline.clip.towers.backbone import Sizes, normalised
from pipeline.clip.towers.schedule import coop

REDUCTION = 16  # the joint width divided by that of the hidden layer


class CoCoOp(PromptLearner):
    """Context `ctx` [n, D] plus `meta_net` of the image's normalised feature, added to each of the n vectors.

    The text tower runs once per image and class; `pipeline.clip.towers.encode` batches and chunks the texts.
    """

    name = "cocoop"
    per_image = True

    def __init__(self, sizes: Sizes, length: int = 4, words: str | None = WORDS) -> None:
        super().__init__(coop(length, sizes.blocks), f"{words or placeholders(length)} {{}}.", length)
        self.words = words
        self.ctx = vectors(length, sizes.text_width)
        hidden = max(1, sizes.joint // REDUCTION)
        layers = {
            "linear1": nn.Linear(sizes.joint, hidden),
            "relu": nn.ReLU(),
            "linear2": nn.Linear(hidden, sizes.text_width),
        }
        self.meta_net = nn.Sequential(OrderedDict(layers))

    def start_words(self) -> str | None:
        return self.words

    def prompts(self, images: Tensor | None = None) -> Prompts:
        assert images is not None, "CoCoOp makes its prompts from image features"
        # DeepSpeed casts trainables to bfloat16 where the recipe asks for it; features are float32.
        shift = self.meta_net(normalised(images).to(self.ctx.dtype))  # [B, D]
        return Prompts({0: (self.ctx + shift[:, None])[:, None]}, {})  # [B, 1, n, D]
