"""Selections with weights: what rules make of scores, how they are put together, and what the decoder reads of them."""

from __future__ import annotations

import pytest
import torch

from pipeline.data.selection import NO_SET, Selection, without_gaps
from pipeline.prompts.insertion import gather_sets
from pipeline.prompts.routers import Router, States, make_router
from pipeline.prompts.rules import make_rule

SCORES = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
TASKS = torch.tensor([0, 1])


def test_hard_is_the_best_module_and_soft_shares_a_sample_among_the_k_best() -> None:
    assert make_rule("hard").inference(SCORES, TASKS).numbers.tolist() == [[1], [0]]
    soft = make_rule({"name": "soft", "k": 2, "temperature": 0.2}).inference(SCORES, TASKS)
    assert soft.numbers.tolist() == [[2, 1], [2, 0]] and soft.weights is not None
    torch.testing.assert_close(soft.weights, torch.softmax(torch.tensor([[0.5, 0.9], [0.3, 0.7]]) / 0.2, dim=1))
    for name in ("hard", "soft"):
        assert make_rule(name).training(SCORES, None).width == 0


def test_parts_of_a_stage_are_joined_to_the_width_of_the_widest() -> None:
    narrow, wide = Selection.same(1, [3]), Selection(torch.tensor([[0, 1]]), torch.tensor([[0.25, 0.75]]))
    joined = Selection.joined([narrow, wide])
    assert joined.numbers.tolist() == [[3, NO_SET], [0, 1]]
    assert joined.weights is not None and joined.weights.tolist() == [[1.0, 0.0], [0.25, 0.75]]
    assert Selection.joined([narrow, narrow]).weights is None
    assert joined.listed() == [[(3, 1.0)], [(0, 0.25), (1, 0.75)]] and joined.chosen(1) == joined.listed()[1]


def test_what_a_sample_is_not_to_get_has_no_weight() -> None:
    left = Selection(torch.tensor([[0, 1], [1, 0]]), torch.full((2, 2), 0.5)).without(torch.tensor([True, False]))
    assert left.numbers.tolist() == [[NO_SET, NO_SET], [1, 0]] and left.full_weights().tolist() == [[0, 0], [0.5, 0.5]]
    assert without_gaps(torch.tensor([[NO_SET, 2, 1]])).tolist() == [[2, 1, NO_SET]]


def test_the_vectors_of_a_set_are_multiplied_by_its_weight() -> None:
    bank = torch.randn(3, 2, 4)
    selected, weights = torch.tensor([[0, 2], [1, NO_SET]]), torch.tensor([[0.25, 0.75], [1.0, 0.0]])
    plain, valid = gather_sets(bank, selected)
    weighted, same = gather_sets(bank, selected, weights)
    torch.testing.assert_close(weighted, plain * weights.repeat_interleave(2, dim=1)[..., None])
    assert torch.equal(valid, same)


def test_states_of_tasks_may_have_any_number_of_tensors_and_what_follows_from_all_is_made_once() -> None:
    states = States([{"centres": torch.randn(n, 4), "count": torch.tensor(float(n))} for n in (1, 3)])
    assert states.stacked("count").tolist() == [1.0, 3.0] and states[1]["centres"].shape == (3, 4)
    made: list[int] = []
    for _ in range(2):
        states.once("inverse", lambda: made.append(len(states)))
    assert made == [2]
    assert len(States.of_stacked({"prototype": torch.zeros(0, 4)})) == 0


@pytest.mark.parametrize("name", ["mean", "prototype"])
def test_a_router_is_made_by_its_name_with_the_options_that_it_has(name: str) -> None:
    router: Router = make_router({"name": name, "image_weight": 0.25})
    assert (router.options.image_weight, router.learned) == (0.25, name == "prototype")
    assert [view.options.image_weight for view in router.views().values()] == [0.25, 1.0, 0.0]
