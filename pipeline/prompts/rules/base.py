"""What a rule is: from the scores of samples to the modules that they get."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from pipeline.config import registry
from pipeline.config.base import Section
from pipeline.config.method import Choice, chosen_options
from pipeline.data.selection import Selection


class Rule:
    """Chooses the modules of each sample; the default trains every module alone.

    `Options` are what a recipe may say: fields of the same names in the method's options (`k`, `gate`, `temperature`)
    are handed to the rule.
    """

    Options: ClassVar[type[Section]] = Section
    compares: ClassVar[bool] = False  # whether it looks at the scores; else only at how many there are
    needs_task: ClassVar[bool] = False  # whether samples' tasks have to be told at inference
    # Whether a sample gets modules of later stages whatever its scores, so that every stage changes earlier answers.
    uses_later: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        """`options` is an instance of the class's own `Options`."""
        self.options = options

    @property
    def probable(self) -> bool:
        """Whether it is given logarithms of the tasks' probabilities in place of the router's scores."""
        return False

    @property
    def needs_own(self) -> bool:
        """Whether `training` has to be given the scores of the stage's own task."""
        return False

    def training(self, scores: Tensor, own: Tensor | None) -> Selection:
        """The earlier modules that accompany the stage's own one, which has the weight 1, in training.

        Args:
            scores: [N, t-1] of the stage's samples to the earlier tasks.
            own: [N] to the stage's own task, whose state stands in for a learned one; None unless `needs_own`.
        """
        return Selection.none(len(scores))

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        """The modules of N samples.

        Args:
            scores: [N, T] to the tasks that have a module.
            tasks: [N] numbers of the samples' own tasks, to be used only by a rule that `needs_task`.
        """
        raise NotImplementedError

    def most(self, modules: int) -> int:
        """The most modules that one sample gets of so many; memory is planned with it."""
        return modules


def make_rule(choice: Choice, options: Section | None = None) -> Rule:
    """The rule that a recipe chooses, with its own options and those that the method's have in common with it."""
    kind = registry.load("rules", choice if isinstance(choice, str) else choice["name"])
    return kind(chosen_options("rules", kind.Options, choice, options))
