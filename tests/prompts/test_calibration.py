"""Calibration: probabilities that mean what they say, and questions that resemble no task (docs/routing.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.config.base import Section
from pipeline.data.keys import Keys
from pipeline.data.selection import NO_SET
from pipeline.errors import UserError
from pipeline.prompts.calibration import calibrate, temperature_of
from pipeline.prompts.routers import States, make_router
from pipeline.prompts.routers.kept_keys import kept_sample
from pipeline.prompts.routers.key_features import side_by_side
from pipeline.prompts.routing import Routing
from pipeline.prompts.rules import make_rule
from pipeline.prompts.unfamiliar import Spread, unfamiliar
from tests.prompts.keys import PAIRS, states_of, task_keys

ROUTERS: list[Any] = ["mean", "centres", "ridge", {"name": "random_ridge", "width": 64}]


class TopKOf(Section):
    k: int = 3


def tasks(seed: int = 0) -> list[Keys]:
    return [task_keys(picture, question, seed=seed, spread=0.0) for picture, question in PAIRS]


def routing(name: Any, **more: Any) -> Routing:
    return Routing(make_router(name), make_rule({"name": "topk", "k": 3, **more}))


def test_the_temperature_has_the_least_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks_of = torch.arange(4).repeat(50)
    scores = torch.randn(200, 4, generator=generator) + 1.5 * torch.nn.functional.one_hot(tasks_of, 4)
    weights = torch.ones(200)
    found = temperature_of(scores, tasks_of, weights)

    def loss(temperature: float) -> float:
        logs = torch.log_softmax(scores.double() / temperature, dim=1)
        own, doubt = logs.gather(1, tasks_of[:, None])[:, 0], 1 / 202
        return float(-((1 - doubt) * own + doubt / 3 * (logs.sum(1) - own)).mean())

    assert all(loss(found) <= loss(found * factor) for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2.0))
    assert temperature_of(scores * 10, tasks_of, weights) == pytest.approx(10 * found, rel=1e-6)


@pytest.mark.parametrize(
    "scores", [torch.eye(3), torch.zeros(3, 3), -torch.eye(3), torch.ones(3, 1)], ids=["all", "none", "wrong", "alone"]
)
def test_scores_that_tell_all_or_nothing_have_a_temperature_too(scores: torch.Tensor) -> None:
    tasks_of = torch.arange(3).clamp_max(scores.shape[1] - 1)
    found = temperature_of(scores, tasks_of, torch.ones(3))
    assert 0 < found < float("inf")


@pytest.mark.parametrize("name", ROUTERS, ids=str)
def test_probabilities_mean_what_they_say(name: Any) -> None:
    states = states_of(name, tasks())
    probabilities = torch.cat([routing(name).route(keys, states, 0).probabilities for keys in tasks(1)])  # type: ignore
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(probabilities)))
    own = torch.arange(len(PAIRS)).repeat_interleave(60)
    right = float((probabilities.argmax(1) == own).double().mean())
    assert abs(float(probabilities.amax(1).mean()) - right) < 0.1


@pytest.mark.parametrize("name", ROUTERS, ids=str)
def test_the_calibration_does_not_depend_on_the_order_of_tasks(name: Any) -> None:
    states, order = states_of(name, tasks()), [3, 0, 5, 1, 4, 2]
    one, other = (calibrate(make_router(name), each) for each in (states, States([states[n] for n in order])))
    assert one is not None and other is not None
    exact = make_router(name).joint  # products with vectors that stand elsewhere have other last bits
    assert one.temperature == pytest.approx(other.temperature, rel=1e-10 if exact else 1e-6)


@pytest.mark.parametrize("name", ROUTERS, ids=str)
def test_questions_of_no_task_are_unfamiliar_and_own_ones_are_not(name: Any) -> None:
    states = states_of(name, tasks())
    own = torch.cat([routing(name).route(keys, states, 0).unfamiliar for keys in tasks(1)])  # type: ignore
    strange = routing(name).route(task_keys(5, 5, spread=0.0), states, 0).unfamiliar
    assert strange is not None and float(own.double().mean()) < 0.06
    assert float(strange.double().mean()) > float(own.double().mean()) + 0.3


def test_a_share_inserts_what_is_probable_enough_whatever_the_scale_of_scores() -> None:
    rule = make_rule({"name": "topk", "share": 0.25})
    logs = torch.tensor([[0.6, 0.3, 0.1], [0.98, 0.01, 0.01]]).log()
    assert rule.probable and rule.needs_own
    assert rule.inference(logs, torch.zeros(2)).numbers.tolist() == [[1, 0, NO_SET], [0, NO_SET, NO_SET]]
    # In training the own task's probability counts among the best.
    earlier, own = logs[:, 1:], logs[:, 0]
    assert rule.training(earlier, own).numbers.tolist() == [[0, NO_SET], [NO_SET, NO_SET]]
    with pytest.raises(UserError, match="expected gate or share"):
        make_rule({"name": "topk", "share": 0.5, "gate": 0.1})


def test_soft_without_a_temperature_weighs_by_the_probabilities() -> None:
    rule = make_rule({"name": "soft", "k": 2, "temperature": None})
    chosen = rule.inference(torch.tensor([[0.6, 0.3, 0.1]]).log(), torch.zeros(1))
    assert rule.probable and chosen.numbers.tolist() == [[1, 0]] and chosen.weights is not None
    torch.testing.assert_close(chosen.weights, torch.tensor([[1 / 3, 2 / 3]]))


@pytest.mark.parametrize("name", ROUTERS, ids=str)
def test_training_and_inference_select_by_one_rule_from_the_same_states(name: Any) -> None:
    known, new = tasks()[:5], tasks()[5]
    same = routing(name, share=0.3)
    earlier = States(list(states_of(name, known)))
    chosen = same.training(new, earlier)
    together = States([*earlier, same.observe(new)])
    routed = same.route(new, together, 0)
    assert routed.probabilities is not None
    for row, shares in zip(chosen.listed(), routed.probabilities, strict=True):
        allowed = {number for number in range(5) if float(shares[number]) >= 0.3 * float(shares.max()) * (1 + 1e-5)}
        assert allowed <= {number for number, _ in row} or len(row) == 2
        assert all(float(shares[number]) >= 0.3 * float(shares.max()) * (1 - 1e-5) for number, _ in row)


def test_what_becomes_of_an_unfamiliar_question_is_a_setting() -> None:
    states, strange = states_of("mean", tasks()), task_keys(5, 5, spread=0.0)
    router, rule = make_router("mean"), make_rule("hard")
    told = {
        kind: Routing(router, rule, unfamiliar=kind).route(strange, states, 0)
        for kind in ("answer", "zero_shot", "flag")
    }
    flags = told["zero_shot"].unfamiliar
    assert flags is not None and flags.any()
    assert (told["zero_shot"].selection.numbers[flags] == NO_SET).all()
    assert torch.equal(told["flag"].selection.numbers, told["answer"].selection.numbers)
    assert torch.equal(told["zero_shot"].selection.numbers[~flags], told["answer"].selection.numbers[~flags])


def test_states_without_kept_keys_have_no_probabilities() -> None:
    router = make_router("mean")
    states = States([router.observe(keys) for keys in tasks()])
    routed = Routing(router, make_rule("hard")).route(tasks()[0], states, 0)
    assert routed.probabilities is None and routed.unfamiliar is None
    with pytest.raises(UserError, match="keep no keys"):
        routing("mean", share=0.5).route(tasks()[0], states, 0)


def test_only_a_routing_that_needs_them_keeps_keys() -> None:
    mean, hard = make_router("mean"), make_rule("hard")
    assert not Routing(mean, hard).keeps_keys and Routing(make_router("ridge"), hard).keeps_keys
    assert Routing(mean, hard, unfamiliar="flag").keeps_keys and routing("mean", share=0.5).keeps_keys
    assert set(Routing(mean, hard).observe(tasks()[0])) == {"prototype"}
    kept = Routing(mean, hard, unfamiliar="flag", keys_per_task=9).observe(tasks()[0])
    assert set(kept) == {"prototype", "keys.image", "keys.text", "keys.has_image"} and len(kept["keys.text"]) == 9


def test_a_distance_is_mahalanobis_of_the_shrunk_scatter_and_the_threshold_leaves_each_key_out() -> None:
    state = kept_sample(task_keys(0, 0, count=30, without=5))
    keys = side_by_side(Keys(state["keys.image"], state["keys.text"], state["keys.has_image"], {})).double()
    spread, other = Spread.of(state), side_by_side(task_keys(0, 1, count=7)).double()

    def distances(to: torch.Tensor, samples: torch.Tensor, added: float) -> torch.Tensor:
        apart, centred = samples - to.mean(0), to - to.mean(0)
        scatter = centred.T @ centred + added * torch.eye(to.shape[1]).double()
        return len(to) * (apart @ torch.linalg.inv(scatter) * apart).sum(1)

    torch.testing.assert_close(spread.distances(other), distances(keys, other, spread.added))
    left = [torch.arange(30) != row for row in range(30)]
    held_out = [distances(keys[rest], keys[~rest], spread.added) * 30 / 29 for rest in left]
    assert spread.threshold == pytest.approx(float(torch.quantile(torch.cat(held_out), 0.99)), rel=0.05)


def several_questions(pictures: int, each: int, seed: int = 0) -> Keys:
    """Keys of a task with `each` questions about every picture; image keys of one picture differ by rounding alone."""
    image = task_keys(0, 0, count=pictures, seed=seed, spread=0.0).image.repeat_interleave(each, 0)
    text = task_keys(0, 0, count=each, spread=0.0).text.repeat(pictures, 1)  # the same questions about every picture
    rounding = 1.0 + 4e-4 * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
    return Keys((image.float() * rounding).half(), text, torch.ones(len(image), dtype=torch.bool), {})


def test_a_key_is_left_out_with_those_of_its_picture() -> None:
    keys = several_questions(pictures=12, each=3)
    spread, vectors = Spread.of(kept_sample(keys)), side_by_side(keys).double()
    held_out = []
    for picture in range(12):
        of_it = torch.arange(36) // 3 == picture
        others = vectors[~of_it] - vectors[~of_it].mean(0)
        apart = vectors[of_it] - vectors[~of_it].mean(0)
        scatter = others.T @ others + spread.added * torch.eye(vectors.shape[1]).double()
        held_out.append(36 * (apart @ torch.linalg.inv(scatter) * apart).sum(1))
    assert spread.threshold == pytest.approx(float(torch.quantile(torch.cat(held_out), 0.99)), rel=1e-6)


def test_new_pictures_of_a_task_with_several_questions_about_each_are_familiar() -> None:
    states = States([kept_sample(several_questions(pictures=30, each=2))])
    new = several_questions(pictures=100, each=2, seed=1)
    assert unfamiliar(new, states, torch.zeros(200, dtype=torch.long)).float().mean() < 0.05
    strange = task_keys(5, 5, spread=0.0)
    assert unfamiliar(strange, states, torch.zeros(60, dtype=torch.long)).float().mean() > 0.9


def test_too_few_kept_keys_make_nothing_unfamiliar() -> None:
    states = states_of("mean", tasks(), most=7)
    assert not unfamiliar(task_keys(5, 5, spread=0.0), states, torch.zeros(60, dtype=torch.long)).any()


def test_the_unfamiliar_are_found_for_more_tasks_than_are_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    states, keys = states_of("mean", tasks()), task_keys(5, 5, spread=0.0)
    numbers = torch.arange(60) % len(PAIRS)
    found = unfamiliar(keys, states, numbers)
    monkeypatch.setattr("pipeline.prompts.unfamiliar.HELD", 1)
    again = states_of("mean", tasks())
    assert torch.equal(unfamiliar(keys, again, numbers), found) and len(again.once("spreads", dict)) == 1


def test_a_task_that_keeps_very_many_keys_is_described_by_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.prompts.unfamiliar.MOST", 20)
    spread = Spread.of(kept_sample(task_keys(0, 0, count=60)))
    assert spread.factor.shape == (20, 20) and spread.threshold < float("inf")
