"""What a rule of a user's own returns is refused with a sentence before anything is trained."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config.base import Section
from pipeline.data.selection import NO_SET, Selection
from pipeline.errors import UserError
from pipeline.prompts.routing import Routing
from pipeline.prompts.rules import Rule
from pipeline.prompts.rules.answers import try_rule
from pipeline.prompts.rules.base import make_rule


class Answers(Rule):
    """Returns what `made` makes of the most similar module [N, 1]."""

    compares = True
    made: Any = None

    def inference(self, scores: Tensor, tasks: Tensor) -> Selection:
        answer: Selection = type(self).made(scores.argmax(1, keepdim=True))
        return answer

    def most(self, modules: int) -> int:
        return 1


def rule(made: Any) -> Rule:
    return type("Answers", (Answers,), {"made": staticmethod(made)})(Section())


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda best: best, r"returned a Tensor; expected a Selection"),
        (lambda best: Selection(best[:, 0]), r"numbers of shape \[3\]; expected \[3, m\]"),
        (lambda best: Selection(best[:1]), r"numbers of shape \[1, 1\]; expected \[3, m\]"),
        (lambda best: Selection(best.float()), r"numbers of torch.float32; expected whole numbers"),
        (lambda best: Selection(best + 5), r"the module numbers 5 to 5; expected 0 to 0"),
        (lambda best: Selection(best - 2), r"the module numbers -2 to -2"),
        (lambda best: Selection(best.repeat(1, 2)), r"2 modules for one sample; expected at most the 1"),
        (lambda best: Selection(best, best[:, 0].float()), r"weights of shape \[3\]; expected \[3, 1\]"),
        (lambda best: Selection(best, best * float("nan")), r"weights that are infinite or no numbers"),
        (lambda best: Selection(best[:, 3]), r"failed on made-up scores \[3, 1\] with IndexError: .*line \d+"),
    ],
)
def test_an_answer_that_is_no_choice_is_refused(made: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        try_rule(rule(made))
    assert "test_rule_answers:Answers" in str(refused.value)


def test_a_rule_without_the_method_is_named() -> None:
    with pytest.raises(UserError, match=r"test_rule_answers:Rule\w* has no method inference\(scores, tasks\)"):
        try_rule(type("RuleWithout", (Rule,), {"__module__": __name__})(Section()))


def test_scores_that_a_trial_does_not_have_are_looked_at_too() -> None:
    wrong = rule(lambda best: Selection(best, 1.0 / best.float()))
    with pytest.raises(UserError, match="infinite"):
        Routing(None, wrong).inference(torch.tensor([[0.9, 0.1]]), 0, torch.ones(1))


def test_the_weight_of_no_module_may_be_anything() -> None:
    try_rule(rule(lambda best: Selection(torch.full_like(best, NO_SET), best * float("nan"))))


@pytest.mark.parametrize("name", ["topk", "oracle", "all", "current", "own", "first", "none", "hard", "soft"])
def test_rules_of_the_project_pass(name: str) -> None:
    try_rule(make_rule(name))
