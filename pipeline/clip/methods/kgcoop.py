"""KgCoOp: CoOp whose text features stay near those of the hand-written template (clip_prompts.md 6)."""

from __future__ import annotations

from pipeline.clip.methods.base import WORDS
from pipeline.clip.methods.coop import CoOp
from pipeline.clip.towers.backbone import Sizes


class KgCoOp(CoOp):
    """CoOp from the words "a photo of a"; its loss needs `pipeline.clip.learning.regularisers.KnowledgeGuided`."""

    name = "kgcoop"

    def __init__(self, sizes: Sizes, length: int = 4, words: str | None = WORDS) -> None:
        super().__init__(sizes, length, words=words)
