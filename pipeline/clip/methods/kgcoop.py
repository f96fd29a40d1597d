"""KgCoOp: CoOp with a penalty on the distance to the hand-written template's features (docs/design.md 5.10)."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.clip.methods.base import WORDS
from pipeline.clip.methods.coop import CoOp
from pipeline.clip.methods.regulariser import Regulariser
from pipeline.clip.methods.regularisers import KnowledgeGuided
from pipeline.clip.towers.backbone import Sizes


class KgCoOp(CoOp):
    """CoOp initialised from "a photo of a"; `knowledge` is the weight of the `KnowledgeGuided` term."""

    name = "kgcoop"
    takes_classes = False

    def __init__(self, sizes: Sizes, length: int = 4, words: str | None = WORDS, knowledge: float = 8.0) -> None:
        super().__init__(sizes, length, words=words)
        self.knowledge = knowledge

    def regularisers(self, template: str) -> Sequence[Regulariser]:
        return (KnowledgeGuided(self.knowledge, template),)
