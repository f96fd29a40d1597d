"""Routers: what they tell apart, and that their scores are a function of the set of tasks (docs/routing.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.data.keys import Keys
from pipeline.prompts.routers import Router, States, make_router
from pipeline.prompts.routers.centres import spherical_centres
from pipeline.prompts.routers.kept_keys import TEXT, kept_keys, kept_sample, picked
from pipeline.prompts.routers.ridge import projection
from tests.prompts.keys import PAIRS, WIDTH, directions, states_of, task_keys

SMALL = {"name": "random_ridge", "width": 64}
CLOSED: list[Any] = ["centres", "ridge", SMALL]
ALL: list[Any] = ["mean", *CLOSED]


def tasks(count: int = 60, seed: int = 0, without: int = 0) -> list[Keys]:
    return [task_keys(picture, question, count, seed, without) for picture, question in PAIRS]


def shuffled(states: States, order: list[int]) -> States:
    return States([states[number] for number in order])


def right(router: Router, states: States, tests: list[Keys]) -> float:
    found = [
        float((router.scores(keys, states).argmax(1) == number).double().mean()) for number, keys in enumerate(tests)
    ]
    return sum(found) / len(found)


def test_tasks_that_differ_less_than_their_samples_do_are_told_apart_by_the_regressions() -> None:
    tests = tasks(seed=1)
    shares = {str(name): right(make_router(name), states_of(name, tasks()), tests) for name in ALL}
    assert shares["ridge"] > 0.95 and shares[str(SMALL)] > 0.95
    assert shares["mean"] < 0.9


@pytest.mark.parametrize("name", ALL, ids=str)
def test_the_order_of_tasks_does_not_matter(name: Any) -> None:
    router, states, keys = make_router(name), states_of(name, tasks()), task_keys(1, 1, seed=2)
    order = [3, 0, 5, 1, 4, 2]
    moved, expected = router.scores(keys, shuffled(states, order)), router.scores(keys, states)[:, order]
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0.0)
    assert torch.equal(moved, expected) or not router.joint  # what is solved for is solved in one order


@pytest.mark.parametrize("most", [4, 40])  # fewer keys than features, and more
@pytest.mark.parametrize("name", CLOSED[1:], ids=str)
def test_held_out_scores_are_those_of_a_regression_without_the_sample(name: Any, most: int) -> None:
    router: Any = make_router({**name, "width": 8} if isinstance(name, dict) else name)
    states = states_of("ridge", tasks(), most)
    kept = kept_keys(states)
    assert kept is not None
    features = router.features(picked(kept.keys, torch.arange(len(kept.tasks))), router.fitted(states)).double()
    targets = torch.nn.functional.one_hot(kept.tasks, len(PAIRS)).double()
    penalty = router.options.ridge * float((features.square().sum() / most) / features.shape[1])
    rows = torch.tensor([7, 3, 20])
    for row, found in zip(rows.tolist(), router.held_out_scores(states, rows), strict=True):
        left = torch.arange(len(features)) != row
        moments = features[left].T @ features[left] / most + penalty * torch.eye(features.shape[1]).double()
        weights = torch.linalg.solve(moments, features[left].T @ targets[left] / most)
        torch.testing.assert_close(found.double(), features[row] @ weights, atol=2e-5, rtol=1e-4)


def test_the_two_ways_to_solve_agree() -> None:
    router, keys = make_router("ridge"), task_keys(1, 1, seed=2)
    assert 6 * 4 < 2 * keys.text.shape[1] + 2 < 6 * 8
    few = router.scores(keys, states_of("ridge", tasks(), 4))
    many = router.scores(keys, States([doubled(state) for state in states_of("ridge", tasks(), 4)]))
    torch.testing.assert_close(few, many, atol=1e-4, rtol=1e-3)  # each key twice at half the weight is the same


def doubled(state: Any) -> dict[str, Tensor]:
    return {name: torch.cat([value, value]) for name, value in state.items()}


def test_every_task_counts_the_same_however_many_samples_it_has() -> None:
    router, keys = make_router("ridge"), task_keys(0, 1, seed=2)
    states = states_of("ridge", tasks(), 20)
    more = States([doubled(doubled(states[0])), *states[1:]])
    torch.testing.assert_close(router.scores(keys, more), router.scores(keys, states), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL, ids=str)
def test_samples_without_images_and_no_tasks_at_all_have_scores(name: Any) -> None:
    router = make_router(name)
    text_only, states = task_keys(0, 0, count=6, seed=3, without=6), states_of(name, tasks(without=10))
    assert router.scores(text_only, states).isfinite().all()
    assert router.scores(text_only, States([])).shape == (6, 0)
    assert router.scores(picked(text_only, torch.arange(0)), states).shape == (0, len(PAIRS))


def test_a_task_of_text_alone_is_told_from_one_with_pictures_and_the_same_questions() -> None:
    both = [task_keys(0, 0), task_keys(0, 0, without=60)]
    tests = [task_keys(0, 0, seed=1), task_keys(0, 0, seed=1, without=60)]
    for name in CLOSED[1:]:
        assert right(make_router(name), states_of(name, both), tests) == 1.0


@pytest.mark.parametrize("name", ALL, ids=str)
def test_scores_are_the_same_in_one_part_and_in_several(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    router, states, keys = make_router(name), states_of(name, tasks()), task_keys(1, 2, seed=2)
    whole = router.scores(keys, states)
    for module in ("mean.SAMPLES_AT_ONCE", "ridge.AT_ONCE", "centres.SAMPLES_AT_ONCE"):
        monkeypatch.setattr(f"pipeline.prompts.routers.{module}", 7)
    torch.testing.assert_close(router.scores(keys, states), whole, atol=1e-6, rtol=1e-5)


def test_centres_are_the_means_of_their_nearest_samples_and_no_more_than_there_are_samples() -> None:
    keys = task_keys(0, 0, count=40)
    points = torch.nn.functional.normalize(torch.cat([keys.text.float(), -keys.text.float()]), dim=1)
    centres = spherical_centres(points, 4, seed=0)
    assert torch.equal(centres, spherical_centres(points, 4, seed=0)) and len(centres) == 4
    nearest = (points @ torch.nn.functional.normalize(centres, dim=1).T).argmax(1)
    for number in range(4):
        torch.testing.assert_close(centres[number], points[nearest == number].sum(0), atol=1e-4, rtol=1e-5)
    assert len(spherical_centres(points[:1].repeat(5, 1), 4, seed=0)) == 1
    assert len(spherical_centres(points[:3], 8, seed=0)) == 3


def test_the_random_projection_is_the_same_everywhere() -> None:
    matrix = projection(3, 2, 0)
    expected = torch.tensor([[1.76405235, 0.40015721], [0.97873798, 2.2408932], [1.86755799, -0.97727788]])
    torch.testing.assert_close(matrix, expected)
    assert not torch.equal(matrix, projection(3, 2, 1))


def test_the_kept_sample_is_drawn_by_the_number_of_samples_alone() -> None:
    keys = task_keys(0, 0, count=300)
    state = kept_sample(keys, 128)
    assert torch.equal(state[TEXT], kept_sample(keys, 128)[TEXT]) and state[TEXT].shape == (128, 12)
    assert state[TEXT].dtype == torch.float16 and state["keys.has_image"].dtype == torch.bool
    places = (keys.text[:, None] == state[TEXT][None]).all(2).nonzero()[:, 0]
    assert places.tolist() == sorted(set(places.tolist())) and len(set((places % 3).tolist())) == 3
    assert torch.equal(kept_sample(keys, 500)[TEXT], keys.text)


@pytest.mark.parametrize("name", ["ridge", {"name": "random_ridge", "width": 500}], ids=str)
def test_a_question_that_all_tasks_share_says_nothing_however_its_key_is_rounded(name: Any) -> None:
    """Prepared keys are rounded to float16, those of a served question are not, and a batch changes the last bits."""
    question = directions(1, 9).expand(60, -1)
    tasks = [Keys(task_keys(picture, 0).image, question.half(), torch.ones(60).bool(), {}) for picture in range(4)]
    states = states_of(name, tasks)
    rounding = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(1))
    asked = Keys(tasks[1].image, question + 1e-4 * rounding, tasks[1].has_image, {})
    router = make_router(name)
    torch.testing.assert_close(router.scores(asked, states), router.scores(tasks[1], states), atol=0.06, rtol=0.0)
