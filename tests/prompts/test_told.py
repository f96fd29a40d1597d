"""What a sample would get had its task been told: its own set ranks first, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.data.keys import Keys
from pipeline.data.selection import NO_SET, Selection
from pipeline.prompts.routers import Router, States, make_router
from pipeline.prompts.routing import Routing, own_first
from pipeline.prompts.rules import make_rule
from tests.prompts.keys import PAIRS, states_of, task_keys

SCORES = torch.tensor([[0.9, 0.5, 0.1, 0.2], [0.3, 0.8, 0.7, 0.1], [0.2, 0.1, 0.6, 0.6], [0.4, 0.1, 0.0, 0.3]])


class Given(Router):
    """A router whose scores are the image keys."""

    def __init__(self) -> None:
        super().__init__(None)

    def scores(self, keys: Any, states: States) -> Tensor:
        return keys.image


def keys_of(scores: Tensor, has_image: Tensor | None = None) -> Keys:
    flags = torch.ones(len(scores), dtype=torch.bool) if has_image is None else has_image
    return Keys(scores, torch.zeros(len(scores), 1), flags, {})


def told(rule: Any, task: int, scores: Tensor = SCORES, **options: Any) -> tuple[Selection, Selection]:
    """The selections of samples of a task, routed and told."""
    routing, keys = Routing(Given(), make_rule(rule), **options), keys_of(scores)
    states = States([{} for _ in range(scores.shape[1])])
    routed = routing.route(keys, states, task)
    return routed.selection, routing.told(routed, states, task, keys.has_image)


def test_the_own_score_and_the_best_one_change_places() -> None:
    changed = own_first(SCORES, 1)
    torch.testing.assert_close(
        changed, torch.tensor([[0.5, 0.9, 0.1, 0.2], [0.3, 0.8, 0.7, 0.1], [0.2, 0.6, 0.1, 0.6], [0.1, 0.4, 0.0, 0.3]])
    )
    assert torch.equal(changed[1], SCORES[1])  # its own set ranked first
    assert changed.argmax(1).tolist() == [1] * 4


@pytest.mark.parametrize("scores", [SCORES, SCORES.double().log_softmax(1), torch.zeros(3, 4), SCORES.bfloat16()])
def test_the_own_set_is_above_every_other_one_even_where_two_share_the_first_place(scores: Tensor) -> None:
    for task in range(4):
        changed = own_first(scores, task)
        first = scores.argmax(1) == task
        assert changed.dtype == scores.dtype and torch.equal(changed[first], scores[first])
        others = changed.clone()
        others[:, task] = -torch.inf
        assert (changed[:, task] > others.amax(1))[~first].all()


def test_probabilities_still_add_up_to_one() -> None:
    changed = own_first(SCORES.double().log_softmax(1), 3).exp()
    torch.testing.assert_close(changed.sum(1), torch.ones(4, dtype=torch.double))


def test_a_sample_whose_own_set_ranks_first_gets_the_same_sets() -> None:
    for rule in ("hard", "topk", {"name": "topk", "k": 2, "gate": 0.15}, {"name": "soft", "k": 2, "temperature": 0.1}):
        for task in range(4):
            routed, changed = told(rule, task)
            right = SCORES.argmax(1) == task
            assert routed.differs(changed).tolist() == (~right).tolist()


def test_a_gate_judges_the_other_sets_as_it_would_had_the_own_one_been_best() -> None:
    routed, changed = told({"name": "topk", "k": 3, "gate": 0.15}, 2)
    assert routed.numbers[1].tolist() == [2, 1, NO_SET] and changed.numbers[1].tolist() == [1, 2, NO_SET]
    # The set that took it is now as far away as the own one was.
    assert changed.numbers[0].tolist() == [2, NO_SET, NO_SET]


def test_weights_are_those_of_a_sample_that_was_routed_as_clearly() -> None:
    routed, changed = told({"name": "soft", "k": 2, "temperature": 0.1}, 1)
    assert changed.weights is not None and routed.weights is not None
    assert (routed.numbers[0].tolist(), changed.numbers[0].tolist()) == ([1, 0], [0, 1])
    torch.testing.assert_close(changed.weights[0], routed.weights[0])


def test_a_question_that_gets_no_sets_for_want_of_a_picture_gets_none_either() -> None:
    routing = Routing(Given(), make_rule("hard"), skip_text=True)
    keys, states = keys_of(SCORES, torch.tensor([True, False, True, True])), States([{}] * 4)
    changed = routing.told(routing.route(keys, states, 0), states, 0, keys.has_image)
    assert changed.numbers.tolist() == [[0], [NO_SET], [0], [0]]


@pytest.mark.parametrize("router", ["mean", "ridge"])
def test_a_share_judges_probabilities_in_which_the_own_task_is_the_most_probable(router: str) -> None:
    tasks = [task_keys(*pair, spread=1.0) for pair in PAIRS]
    routing = Routing(make_router(router), make_rule({"name": "topk", "k": 3, "share": 0.2}))
    states, strange = states_of(router, tasks), task_keys(0, 1, seed=5, spread=1.0)
    routed = routing.route(strange, states, 4)
    changed = routing.told(routed, states, 4, strange.has_image)
    assert routed.probabilities is not None and (routed.scores.argmax(1) != 4).all()
    for place, sets in enumerate(changed.listed()):
        shares, first = routed.probabilities[place].clone(), int(routed.probabilities[place].argmax())
        shares[[first, 4]] = shares[[4, first]]
        allowed = [number for number in shares.argsort().tolist() if shares[number] >= 0.2 * shares[4]]
        assert [number for number, _ in sets] == allowed[-3:] and sets[-1][0] == 4


def test_a_question_that_resembles_no_task_gets_its_tasks_sets_when_told() -> None:
    states, strange = states_of("mean", [task_keys(*pair) for pair in PAIRS]), task_keys(5, 5, spread=0.0)
    routing = Routing(make_router("mean"), make_rule("hard"), unfamiliar="zero_shot")
    routed = routing.route(strange, states, 2)
    assert (routed.selection.numbers == NO_SET).any()
    assert set(routing.told(routed, states, 2, strange.has_image).numbers[:, 0].tolist()) == {2}
    flagged = Routing(make_router("mean"), make_rule("hard"), unfamiliar="flag")
    kept = flagged.route(strange, states, 2)
    right = kept.scores.argmax(1) == 2
    assert torch.equal(flagged.told(kept, states, 2, strange.has_image).differs(kept.selection), ~right)


@pytest.mark.parametrize("rule", ["all", "current", "own", "first", "none", "oracle"])
def test_there_is_nothing_to_tell_where_scores_do_not_choose(rule: str) -> None:
    assert not Routing(Given(), make_rule(rule)).can_be_told
    assert not Routing(None, make_rule("own")).can_be_told
    assert Routing(Given(), make_rule("hard")).can_be_told


def test_selections_are_compared_and_replaced_sample_by_sample() -> None:
    plain = Selection(torch.tensor([[0, 1], [1, NO_SET]]))
    wide = Selection(torch.tensor([[0, 1, NO_SET], [1, 2, 0]]))
    assert plain.differs(wide).tolist() == [False, True] and plain.differs(plain).tolist() == [False, False]
    weighted = Selection(plain.numbers, torch.tensor([[1.0, 1.0], [0.5, 0.0]]))
    assert plain.differs(weighted).tolist() == [False, True]
    assert plain.replaced(torch.tensor([1]), wide.rows(torch.tensor([1]))).numbers.tolist() == [[0, 1, -1], [1, 2, 0]]
    assert Selection.none(0).differs(Selection.none(0)).tolist() == []
