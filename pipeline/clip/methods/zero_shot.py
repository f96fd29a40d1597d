"""Zero-shot CLIP: no trainables; class texts come from a template."""

from __future__ import annotations

from torch import Tensor

from pipeline.clip.methods.base import TEMPLATE, PromptLearner, Prompts
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.schedule import schedule


class ZeroShot(PromptLearner):
    """The frozen model without prompts, with the dataset's `template` (docs/design.md 5.11)."""

    name = "zero_shot"
    learns = False

    def __init__(self, sizes: Sizes, template: str = TEMPLATE) -> None:
        super().__init__(schedule([], [], sizes.blocks), template)

    def prompts(self, images: Tensor | None = None) -> Prompts:
        return Prompts({}, {})
