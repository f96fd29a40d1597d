"""The section `evaluate`: the generation of the answers that are scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.base import Section


class EvaluateConfig(Section):
    """Generation of the answers that are scored."""

    batch: int = Field(50, ge=1, description="samples per generate call and rank")
    zero_shot: bool = Field(True, description="score the frozen model alone before the first stage")
    ahead: bool = Field(
        False, description="also score each task just before its own stage, for forward transfer; costs a test set each"
    )
    repetition_penalty: Annotated[float, Field(gt=0)] | Literal["checkpoint"] = Field(
        1.0,
        description="penalty for tokens that the answer has already; 1: none, so that boxes and numbers can repeat "
        "digits; checkpoint: the value in the model's generation_config.json",
    )
    reuse: bool = Field(True, description="keep an answer when a later stage selects the same sets")
    share_images: bool = Field(
        False,
        description="encode an image once for all questions about it that get the same sets; always on with "
        "method.insertion after_image",
    )
