"""The options of low-rank updates, which parts and the methods that have one read."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from pipeline.config.base import Section

# The names of the output layer, the input embeddings and the image projector among the targets, whatever an
# architecture calls them.
OUTPUT_LAYER, INPUT_LAYER, IMAGE_LAYER = "lm_head", "embed_tokens", "image_projector"
BEFORE_DECODER = (INPUT_LAYER, IMAGE_LAYER)


class LowRankOptions(Section):
    """Which of the decoder's layers are updated, and how."""

    TRAINING_ONLY: ClassVar[frozenset[str]] = frozenset({"dropout"})

    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"),
        min_length=1,
        description="ends of the names of the decoder's linear layers that get an update; lm_head: the output layer, "
        "which scores the words, also where it shares its weights with the input embeddings; embed_tokens: the input "
        "embeddings of all words that the decoder reads; image_projector: the image "
        "projector of models such as LLaVA-1.5, as one layer (these two not of the methods moelora and core_moe)",
    )
    rank: int = Field(8, ge=1, description="rank of each update")
    image_rank: int | None = Field(
        None,
        ge=1,
        description="rank of image_projector's update; null: that of the others",
    )
    alpha: float = Field(16.0, gt=0, description="an update counts alpha / rank times")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the numbers that a trained update reads which are set to zero in training, the others "
        "being scaled up; an update of the input embeddings reads no numbers",
    )

    def rank_of(self, layer: str) -> int:
        """The rank of the update of a layer, by its name."""
        return self.image_rank or self.rank if layer == IMAGE_LAYER else self.rank

    @property
    def scale(self) -> float:
        """What an update's output is multiplied by."""
        return self.alpha / self.rank
