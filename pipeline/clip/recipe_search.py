"""The search section of a benchmark's row: which prompt lengths are compared, and how they are learned."""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.clip.search_space import Arrangement, Start, TowerOptions
from pipeline.config.base import Section

LengthOptions = tuple[int, ...]


class OptionsConfig(Section):
    """The numbers of prompts that each block of a tower may get."""

    text: LengthOptions = Field(description="numbers of prompts of a text block, from 0, increasing")
    vision: LengthOptions = Field(description="numbers of prompts of an image block, from 0, increasing")

    @field_validator("text", "vision")
    @classmethod
    def _from_none_on(cls, options: LengthOptions) -> LengthOptions:
        rising = all(first < second for first, second in itertools.pairwise(options))
        if len(options) < 2 or options[0] != 0 or not rising:
            raise ValueError(
                f"the options are {list(options)}; expected 0 and one or more larger numbers, increasing, such as "
                "[0, 1, 2]"
            )
        return options

    @property
    def towers(self) -> TowerOptions:
        """The options as the search takes them."""
        return TowerOptions(self.text, self.vision)


class SearchConfig(Section):
    """A search before the training of each unit: how many prompts each block of each tower gets."""

    like: str | None = Field(None, description="name of an earlier row whose search this one takes; null: its own")
    options: OptionsConfig = Field(
        OptionsConfig(text=tuple(range(7)), vision=tuple(range(7))),
        description="numbers of prompts to choose from: one list, or one for each of text and vision",
    )
    epochs: int = Field(80, ge=1, description="passes over the training images, warm-up included")
    global_batch: int = Field(4, ge=1, description="training images per step, over all ranks")
    lr: float = Field(0.0035, gt=0, description="SGD's rate of the prompts after the warm-up")
    alpha_lr: float = Field(0.0035, gt=0, description="Adam's rate of the weights of the options")
    validation_batch: int = Field(16, ge=1, description="validation images per step, over all ranks")
    validation: Literal["shuffled", "first"] = Field(
        "shuffled",
        description="shuffled: batches that pass through all validation images; first: the first batch at every step, "
        "which holds a few classes only, as released",
    )
    held_out: int = Field(
        4,
        ge=1,
        description="of a dataset without validation images: most training images per class (of few: half of them) "
        "that the search validates on instead; the training after it has them all",
    )
    start: Start = Field(
        "small",
        description="initial prompts: small: as in training (deviation 0.02); released: deviation 1 and uniform, at "
        "which they hardly move",
    )
    lengths: Arrangement = Field(
        "found",
        description="found: as found; controls with as many prompts per tower: shuffled: the same lengths, exchanged "
        "between blocks at random; even: as equal as the total allows, longer ones in the first blocks",
    )
    tie: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="the shortest option within this of the largest weight is chosen; 0: that of the largest"
    )

    @field_validator("options", mode="before")
    @classmethod
    def _one_list_for_both(cls, options: Any) -> Any:
        return {"text": options, "vision": options} if isinstance(options, list | tuple) else options

    @model_validator(mode="after")
    def _like_alone(self) -> SearchConfig:
        others = sorted(self.model_fields_set - {"like", "lengths"})
        if self.like is not None and any(getattr(self, f) != type(self).model_fields[f].default for f in others):
            raise ValueError(
                f"like: {self.like} takes that row's search, so {', '.join(others)} cannot be set beside it"
            )
        return self

    @property
    def longest(self) -> dict[str, int]:
        """The most prompts of a block by tower: what stands for the lengths before they are found."""
        return {"text": self.options.text[-1], "vision": self.options.vision[-1]}
