"""DPL: prompts as keys and values, a number of its own for each block of each tower (docs/clip_prompts.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from pipeline.clip.methods.base import TEMPLATE, PromptLearner, Prompts, vectors
from pipeline.clip.templates import PROMPTSRC
from pipeline.clip.towers.backbone import Sizes
from pipeline.clip.towers.schedule import keys_and_values
from pipeline.clip.towers.text import ClassTexts, Words, averaged_texts
from pipeline.errors import UserError


class DPL(PromptLearner):
    """Prompts `ctx_text.<block>` and `ctx_vision.<block>`, which only that block's attention sees.

    Args:
        sizes: sizes of the backbone.
        text: the number of prompts of each text block (a single number: of all of them); 0 for none.
        vision: the same of each image block.
        template: makes the class texts.
        texts: template; or ensemble: the mean token embeddings over the sixty published templates, as released.
    """

    name = "dpl"
    searches = True

    def __init__(
        self,
        sizes: Sizes,
        text: int | list[int] = 0,
        vision: int | list[int] = 0,
        template: str = TEMPLATE,
        texts: Literal["template", "ensemble"] = "template",
    ) -> None:
        super().__init__(keys_and_values(text, vision, sizes.blocks), template)
        self.averaged = texts == "ensemble"
        self.ctx_text = _by_block(self.schedule.text.kv, sizes.text_width)
        self.ctx_vision = _by_block(self.schedule.vision.kv, sizes.vision_width)

    @classmethod
    def refuse_values(cls, options: Mapping[str, Any]) -> None:
        both = [options.get(tower, 0) for tower in ("text", "vision")]
        if not any(any(given) if isinstance(given, list) else given for given in both):
            raise UserError(
                f"The method {cls.name} would have no prompt in any block; expected lengths above 0 in its options "
                "`text` or `vision`, or `search`, which finds them."
            )

    def texts(self, words: Words, names: Sequence[str]) -> ClassTexts:
        return averaged_texts(words, names, PROMPTSRC) if self.averaged else super().texts(words, names)

    def prompts(self, images: Tensor | None = None) -> Prompts:
        return Prompts(*({int(block): p for block, p in part.items()} for part in (self.ctx_text, self.ctx_vision)))


def _by_block(lengths: Sequence[int], width: int) -> nn.ParameterDict:
    return nn.ParameterDict({str(block): vectors(count, width) for block, count in enumerate(lengths) if count})
