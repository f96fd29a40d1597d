"""What a router makes of a pool is a function of the set of tasks: however the pool came to be, scores are the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.data.keys import Keys
from pipeline.errors import UserError
from pipeline.methods import Stage
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routers import State, States, make_router
from pipeline.prompts.routers.kept_keys import kept_sample, require_finite
from pipeline.prompts.routing import Routing
from pipeline.prompts.rules import make_rule
from pipeline.prompts.stage_files import add_stage, load_stage, save_stage, stage_tensors, start_stage_folder
from pipeline.ranks.world import World
from pipeline.sequence import stage_files
from tests.prompts.keys import PAIRS, task_keys

ROUTERS: list[Any] = ["mean", "centres", "ridge", {"name": "random_ridge", "width": 64}]


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the project logs, also where a run in this process has made its logger keep that to itself."""
    logger = logging.getLogger("pipeline")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def routing(name: Any, **more: Any) -> Routing:
    return Routing(make_router(name), make_rule("hard"), unfamiliar="flag", **more)


def tasks() -> list[Keys]:
    return [task_keys(picture, question) for picture, question in PAIRS]


def pool_of(name: Any, numbers: list[int]) -> PromptPool:
    pool, keys = PromptPool(), tasks()
    for number in numbers:
        pool.append(f"T{number}", {"prompt": torch.full((2, 3), float(number))}, routing(name).observe(keys[number]))
    return pool


def answers(name: Any, states: States) -> tuple[torch.Tensor, ...]:
    routed = routing(name).route(task_keys(1, 1, seed=2), states, 0)
    assert routed.probabilities is not None and routed.unfamiliar is not None
    return routed.scores, routed.probabilities, routed.unfamiliar


def assert_same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...], columns: list[int]) -> None:
    for left, right in zip(one, other, strict=True):
        picked = right[:, columns] if right.ndim == 2 else right
        torch.testing.assert_close(left, picked, atol=1e-6, rtol=1e-5)


def same_bits(one: State, other: State) -> bool:
    same = all(torch.equal(one[name], value) and one[name].dtype == value.dtype for name, value in other.items())
    return one.keys() == other.keys() and same


@pytest.mark.parametrize("name", ROUTERS, ids=str)
def test_a_pool_made_stage_by_stage_through_files_scores_as_one_made_at_once(name: Any, tmp_path: Path) -> None:
    staged, made, keys = PromptPool(), routing(name), tasks()
    for stage, number in enumerate([4, 2, 0, 1, 5, 3]):
        task = f"T{number}"
        start_stage_folder(tmp_path, stage, task)
        values = {"prompt": torch.full((2, 3), float(number))}
        save_stage(tmp_path, stage, task, stage_tensors(values, made.observe(keys[number])), {})
        found = load_stage(tmp_path, stage, task)
        assert found is not None
        before = list(staged.states)
        add_stage(staged, task, found.tensors)
        assert all(same_bits(one, other) for one, other in zip(staged.states, before, strict=False))
        made.route(keys[0], staged.states, 0)  # a router that is fitted after every stage is none the worse for it
    at_once = pool_of(name, list(range(6)))
    assert_same(answers(name, staged.states), answers(name, at_once.states), [4, 2, 0, 1, 5, 3])
    staged.save(tmp_path / "pool.safetensors")
    read = PromptPool.load(tmp_path / "pool.safetensors")
    assert all(same_bits(one, other) for one, other in zip(read.states, staged.states, strict=True))
    assert read.states_fingerprint() == staged.states_fingerprint()
    assert all(torch.equal(a, b) for a, b in zip(answers(name, read.states), answers(name, staged.states), strict=True))


@pytest.mark.parametrize("name", ROUTERS, ids=str)
def test_joined_pools_and_picked_ones_score_as_pools_of_those_tasks(name: Any) -> None:
    joined = PromptPool.joined([pool_of(name, [0, 3]), pool_of(name, [2, 1])])
    assert_same(answers(name, joined.states), answers(name, pool_of(name, [0, 1, 2, 3]).states), [0, 3, 2, 1])
    whole = pool_of(name, [0, 1, 2, 3, 4, 5])
    answers(name, whole.states)
    assert_same(
        answers(name, whole.picked([1, 4, 5]).states), answers(name, pool_of(name, [1, 4, 5]).states), [0, 1, 2]
    )


def test_the_regressions_have_the_same_bits_however_the_pool_came_to_be() -> None:
    for name in ROUTERS[2:]:
        joined = PromptPool.joined([pool_of(name, [3, 0]), pool_of(name, [2, 1])])
        one, other = answers(name, joined.states), answers(name, pool_of(name, [0, 1, 2, 3]).states)
        assert torch.equal(one[0], other[0][:, [3, 0, 2, 1]]) and torch.equal(one[2], other[2])
        torch.testing.assert_close(one[1], other[1][:, [3, 0, 2, 1]], atol=1e-10, rtol=0.0)


def test_only_the_rank_that_routes_holds_the_kept_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_stage_folder(tmp_path, 0, "T0")
    values = {"prompt": torch.ones(2, 3)}
    save_stage(tmp_path, 0, "T0", stage_tensors(values, routing("mean").observe(tasks()[0])), {})
    monkeypatch.setattr(stage_files, "on_main", lambda _, work: work())
    found = []
    for rank in range(2):
        session: Any = SimpleNamespace(path=tmp_path, world=World(rank, 2, rank, torch.device("cpu")))
        checkpoint = stage_files.StageFiles(session, [("T0", "")], {}).restore(0, Stage("T0", (0,)))
        assert checkpoint is not None
        found.append(checkpoint.tensors.keys())
    assert found[0] - found[1] == {f"router.keys.{name}" for name in ("image", "text", "has_image")}
    assert found[1] == {"prompt", "prototype"}


def test_another_sample_of_keys_is_another_state() -> None:
    first, second = pool_of("ridge", [0, 1]), pool_of("ridge", [0, 2])
    assert first.states_fingerprint() != second.states_fingerprint()
    second.tensors, second.names = first.tensors, first.names
    assert first.whole_fingerprint() != second.whole_fingerprint()
    assert first.whole_fingerprint() == pool_of("ridge", [0, 1]).whole_fingerprint()


def test_what_one_rank_has_fitted_is_what_another_scores_with() -> None:
    main, other = (pool_of("ridge", [0, 1, 2]).states for _ in range(2))
    made = routing("ridge").fitted(main)
    assert not any("leverage" in value for value in made.values() if isinstance(value, dict))
    marked = {
        name: {**value, "weights": value["weights"] * 2} if isinstance(value, dict) else value
        for name, value in made.items()
    }
    routing("ridge").use(other, marked)
    assert torch.equal(answers("ridge", other)[0], answers("ridge", main)[0] * 2)


def test_a_task_with_too_few_samples_makes_all_be_routed_by_their_means(warned: pytest.LogCaptureFixture) -> None:
    keys = [task_keys(0, 0), task_keys(1, 1), task_keys(2, 2, count=3)]
    states = States([routing("ridge").observe(one) for one in keys])
    routed = routing("ridge").route(keys[0], states, 0)
    assert "1 of 3 tasks" in warned.text and "fewer than the 4 samples that the router ridge needs" in warned.text
    mean = routing("mean").route(keys[0], States([routing("mean").observe(one) for one in keys]), 0)
    torch.testing.assert_close(routed.scores, mean.scores, atol=2e-3, rtol=0.0)
    warned.clear()
    routing("ridge").route(keys[0], states, 0)
    assert not warned.text


def test_twenty_samples_are_enough(warned: pytest.LogCaptureFixture) -> None:
    keys = [task_keys(picture, question, count=20) for picture, question in PAIRS]
    states = States([routing("ridge").observe(one) for one in keys])
    best = routing("ridge").route(task_keys(1, 1, seed=5), states, 0).scores.argmax(1)
    assert float((best == 2).double().mean()) > 0.9 and not warned.text


def test_keys_that_are_not_finite_are_named_with_their_task_and_number() -> None:
    keys = task_keys(0, 0, count=10, without=3)
    keys.image[0, 0] = float("nan")  # of a sample without an image, which is not looked at
    require_finite(keys, "the task Shapes")
    keys.text[4, 1], keys.image[6, 0], keys.image[7, 2] = float("inf"), float("nan"), float("inf")
    with pytest.raises(UserError, match="3 of 10 samples of the task Shapes have routing keys that are not finite"):
        routing("ridge").observe(keys, task="the task Shapes")


def test_states_of_another_router_are_completed_from_kept_keys_or_refused_with_the_reason() -> None:
    keys = tasks()
    kept = States([routing("ridge").observe(one) for one in keys])
    found = routing("centres").route(keys[0], kept, 0).scores
    torch.testing.assert_close(
        found, routing("centres").route(keys[0], pool_of("centres", list(range(6))).states, 0).scores
    )
    without = States([make_router("mean").observe(one) for one in keys])
    with pytest.raises(
        UserError, match="6 of 6 tasks were learned with another router than ridge, which needs routing keys"
    ):
        routing("ridge").route(keys[0], without, 0)
    with pytest.raises(UserError, match="than prototype, which needs a vector that is learned"):
        routing("prototype").route(keys[0], kept, 0)


def test_keys_of_another_width_are_refused_by_the_pool() -> None:
    pool = pool_of("ridge", [0])
    other = Keys(torch.ones(5, 7), torch.ones(5, 7), torch.ones(5, dtype=torch.bool), {})
    with pytest.raises(UserError, match=r"'T1' has keys\.text of shape \(7,\), the pool holds \(12,\)"):
        pool.append("T1", {"prompt": torch.zeros(2, 3)}, kept_sample(other))


@pytest.mark.parametrize("name", ["mean", "centres"])
def test_a_task_whose_keys_are_not_finite_takes_no_questions_of_others(name: str) -> None:
    """Neither router keeps keys here, and a score that is not a number would rank first for every question."""
    plain, keys = Routing(make_router(name), make_rule("hard")), task_keys(0, 0)
    keys.text[4, 1] = float("nan")
    with pytest.raises(UserError, match="1 of 60 samples of the task Shapes have routing keys that are not finite"):
        plain.observe(keys, task="the task Shapes")
    damaged = {key: value * float("nan") for key, value in plain.observe(task_keys(0, 0)).items()}
    states = States([plain.observe(task_keys(1, 1)), damaged])
    with pytest.raises(UserError, match=rf"router {name} has no score for 1 of 2 tasks \(the first: number 2\)"):
        plain.route(task_keys(1, 1), states, 0)


@pytest.mark.parametrize("name", ["centres", "ridge", "prototype"])
def test_what_is_learned_beside_other_states_is_told_by_the_whole_pool(name: str) -> None:
    """A stage in progress is begun anew where the states that its earlier modules were chosen by have changed."""
    router, first = Routing(make_router(name), make_rule("hard")), {"prompt": torch.zeros(2, 3)}
    prints = set()
    for keys in (task_keys(0, 0), task_keys(1, 1)):
        pool = PromptPool()
        pool.append("T0", first, router.observe(keys))
        prints.add(pool.whole_fingerprint())
    assert len(prints) == 2


def degenerate() -> dict[str, list[Keys]]:
    one, other = task_keys(0, 0), task_keys(1, 1)
    same = Keys(one.image[:1].expand(60, -1), one.text[:1].expand(60, -1), one.has_image, {})
    no_images = [task_keys(0, 0, without=60), task_keys(1, 1, without=60)]
    single = [task_keys(0, 0, count=1), task_keys(1, 1, count=1, without=1)]
    return {
        "one": [one],
        "twice the same": [one, one],
        "one sample many times": [same, other],
        "nothing else": [same],
        "no images": no_images,
        "one sample each": single,
    }


@pytest.mark.parametrize("case", list(degenerate()))
@pytest.mark.parametrize("name", ROUTERS, ids=str)
def test_degenerate_tasks_have_scores_and_probabilities(name: Any, case: str) -> None:
    states = States([routing(name).observe(keys) for keys in degenerate()[case]])
    for asked in (task_keys(0, 0, seed=1), task_keys(2, 2, seed=1, without=60)):
        found = routing(name).route(asked, states, 0)
        assert found.probabilities is not None and found.scores.isfinite().all()
        torch.testing.assert_close(found.probabilities.sum(1), torch.ones(60))
        if case == "twice the same":
            torch.testing.assert_close(found.probabilities, torch.full((60, 2), 0.5), atol=1e-3, rtol=0)
