"""Rules for modules that are trained alone and mixed by weight at inference, such as low-rank updates."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from pipeline.config.base import Section
from pipeline.data.selection import Selection
from pipeline.prompts.rules.base import Rule
from pipeline.prompts.rules.top_k import select_for_inference


class Hard(Rule):
    """The most similar module alone."""

    compares = True

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        return Selection(select_for_inference(scores, k=1))

    def most(self, modules: int) -> int:
        return min(1, modules)


class SoftOptions(Section):
    """How many modules share a sample, and how evenly."""

    k: int = Field(3, ge=1, description="most modules of one sample")
    temperature: float | None = Field(
        0.05,
        gt=0,
        description="divides the scores in the softmax; small: the best one alone; null: modules count by the "
        "probability of their task",
    )


class Soft(Rule):
    """The k most similar modules, each with its share of softmax(score / temperature) over these k.

    Without a temperature the shares are those of the tasks' probabilities.
    """

    Options = SoftOptions
    compares = True

    @property
    def probable(self) -> bool:
        return self.options.temperature is None

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        numbers = select_for_inference(scores, self.options.k)
        chosen = scores.gather(1, numbers).float()
        # Logarithms of probabilities need no temperature: their softmax are the probabilities, divided by their sum.
        temperature = 1.0 if self.options.temperature is None else self.options.temperature
        return Selection(numbers, torch.softmax(chosen / temperature, dim=1))

    def most(self, modules: int) -> int:
        return min(self.options.k, modules)


class WeightedOptions(Section):
    """How the weights follow from the scores."""

    route: Literal["soft", "hard"] = Field(
        "soft", description="soft: softmax(score / temperature) over all tasks; hard: 1 for the best, 0 for the others"
    )
    temperature: float = Field(0.05, gt=0, description="divides the scores in the softmax; small: the best one alone")


class Weighted(Rule):
    """Every module, each with its weight, in the order of the stages; one of weight 0 costs nothing in a layer.

    All are given, so that a part may also do with them what does not depend on the weights.
    """

    Options = WeightedOptions
    compares = True

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        numbers = Selection.same(len(scores), range(scores.shape[1])).numbers
        if self.options.route == "hard":
            return Selection(numbers, one_hot(scores.argmax(1), scores.shape[1]).float())
        return Selection(numbers, torch.softmax(scores.float() / self.options.temperature, dim=1))
