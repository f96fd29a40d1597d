"""Rules for modules that are trained alone and mixed by weight at inference, such as low-rank updates."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

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
    temperature: float = Field(0.05, gt=0, description="divides the scores in the softmax; small: the best one alone")


class Soft(Rule):
    """The k most similar modules, each with its share of softmax(score / temperature) over these k."""

    Options = SoftOptions
    compares = True

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        numbers = select_for_inference(scores, self.options.k)
        chosen = scores.gather(1, numbers).float()
        return Selection(numbers, torch.softmax(chosen / self.options.temperature, dim=1))

    def most(self, modules: int) -> int:
        return min(self.options.k, modules)
