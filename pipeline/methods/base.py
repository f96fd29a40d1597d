"""What distinguishes the methods: their stages, what a stage starts from, which sets a sample gets, and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pipeline.data.selection import NO_SET
from pipeline.prompts.pool import PromptPool

if TYPE_CHECKING:
    from pipeline.config.method import MethodConfig
    from pipeline.data.keys import AnyKeys


@dataclass(frozen=True)
class Stage:
    """One training: its name, which the prompt set gets too, and the numbers of the tasks trained on."""

    name: str
    tasks: tuple[int, ...]


class Method:
    """A way to learn and use prompt sets; the default is one set of its own per stage, trained alone."""

    name: ClassVar[str]
    learns_prototypes: ClassVar[bool] = False
    carries_prompt: ClassVar[bool] = False

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    @property
    def needs_task(self) -> bool:
        """Whether a sample's task has to be told at inference, rather than found by routing."""
        return False

    def stages(self, tasks: Sequence[str]) -> list[Stage]:
        """The stages of a sequence over these tasks, in order."""
        return [Stage(name, (index,)) for index, name in enumerate(tasks)]

    def training_sets(self, pool: PromptPool, keys: AnyKeys) -> Tensor:
        """Numbers of the earlier sets inserted before the current one, per training sample [N, m]; NO_SET = none."""
        return torch.full((len(keys.image), 0), NO_SET, dtype=torch.long)

    def evaluation_sets(self, pool: PromptPool, task: int, scores: Tensor) -> Tensor:
        """Numbers of the sets that fit the samples at inference [N, m], given their task and similarities [N, T]."""
        raise NotImplementedError

    def answering_sets(self, pool: PromptPool, task: int, scores: Tensor, has_image: Tensor) -> Tensor:
        """Numbers of the sets inserted at inference [N, m]: `evaluation_sets`, none for what the recipe skips.

        `has_image` [N]. With `method.text_only` skip a question without an image gets no set (modalprompt.md 8, B6).
        """
        selected = self.evaluation_sets(pool, task, scores)
        if self.config.text_only == "skip":
            selected = selected.masked_fill(~has_image.bool().to(selected.device)[:, None], NO_SET)
        return selected
