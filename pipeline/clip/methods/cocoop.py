"""CoCoOp: a small network shifts the context by what is in the image (docs/design.md 5.2)."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from pipeline.clip.methods.base import WORDS, PromptLearner, Prompts, placeholders, vectors
from pipeline.clip.towers.backbone import Sizes, normalised
from pipeline.clip.towers.schedule import coop

REDUCTION = 16  # the hidden layer has a sixteenth of the joint width


class CoCoOp(PromptLearner):
    """Context `ctx` [n, D] plus, for each image, `meta_net` of its normalised feature, the same for all n vectors.

    Texts are read once per image and class; `pipeline.clip.towers.encode` batches and chunks them.
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
        # An engine in bfloat16 casts all trainables, while features are float32.
        shift = self.meta_net(normalised(images).to(self.ctx.dtype))  # [B, D]
        return Prompts({0: (self.ctx + shift[:, None])[:, None]}, {})  # [B, 1, n, D]
