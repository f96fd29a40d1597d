"""Rules that choose without looking at the scores."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from pipeline.config.base import Section
from pipeline.data.selection import Selection
from pipeline.prompts.rules.base import Rule


class AllOptions(Section):
    """What stands beside the module that is trained."""

    forward: Literal["all", "own"] = Field(
        "all", description="all: a module is trained beside all earlier ones; own: alone, and answers use all"
    )


class All(Rule):
    """Every module, in the order of the stages."""

    Options = AllOptions
    uses_later = True

    def training(self, scores: Tensor, own: Tensor | None) -> Selection:
        if self.options.forward == "own":
            return Selection.none(len(scores))
        return Selection.same(len(scores), range(scores.shape[1]))

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        return Selection.same(len(scores), range(scores.shape[1]))


class Current(Rule):
    """The newest module, whatever the sample."""

    uses_later = True

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        return Selection.same(len(scores), [scores.shape[1] - 1])

    def most(self, modules: int) -> int:
        return min(1, modules)


class Own(Rule):
    """The module of the sample's own task, which has to be told."""

    needs_task = True

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        return Selection(tasks.long()[:, None].clone())

    def most(self, modules: int) -> int:
        return min(1, modules)


class First(Rule):
    """The first module, as where there is only one."""

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        return Selection.same(len(scores), [0])

    def most(self, modules: int) -> int:
        return min(1, modules)


class Nothing(Rule):
    """No module: the frozen model as it is."""

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        return Selection.none(len(scores))

    def most(self, modules: int) -> int:
        return 0
