"""What each method trains, inserts and starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.config import registry
from pipeline.config.method import method_options
from pipeline.data.keys import Keys
from pipeline.data.selection import NO_SET
from pipeline.errors import UserError
from pipeline.methods import Method, make_method
from pipeline.methods.modalprompt import ModalPromptOptions
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routers.mean import similarity
from pipeline.sequence.engine import require_learnable
from tests.training.worlds import make_pool, make_samples

TASKS = ["a", "b", "c"]
METHODS = registry.names("methods")
CARRIED = {"sequential", "l2p", "lora", "moelora", "ewc", "lwf"}


def method(name: str, **fields: Any) -> Method:
    """A method; ModalPrompt with the learned router unless another one is named."""
    given = {"router": "prototype", **fields} if name == "modalprompt" else fields
    return make_method(method_options(name=name, **given))


def trained_behind(method: Method, pool: PromptPool, keys: Any) -> Tensor:
    """Numbers of the earlier sets [N, m] of the training samples."""
    return method.routing.training(keys, pool.states).numbers


def inserted(method: Method, scores: Tensor, task: int = 0, has_image: Tensor | None = None) -> Tensor:
    """Numbers of the sets [N, m] at inference."""
    pictured = torch.ones(len(scores), dtype=torch.bool) if has_image is None else has_image
    return method.routing.inference(scores, task, pictured).numbers


@pytest.mark.parametrize("name", ["modalprompt", "sequential", "independent"])
def test_a_sequence_has_one_stage_per_task(name: str) -> None:
    assert [(stage.name, stage.tasks) for stage in method(name).stages(TASKS)] == [
        ("a", (0,)),
        ("b", (1,)),
        ("c", (2,)),
    ]


def test_joint_has_one_stage_on_all_tasks() -> None:
    assert [stage.tasks for stage in method("joint").stages(TASKS)] == [(0, 1, 2)]


def test_zero_shot_has_no_stage_and_no_set() -> None:
    assert method("zero_shot").stages(TASKS) == []
    assert inserted(method("zero_shot"), torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("name", ["sequential", "independent", "joint"])
def test_only_modalprompt_trains_behind_earlier_sets(name: str) -> None:
    _, keys = make_samples(5)
    assert trained_behind(method(name), make_pool(3), keys).shape == (5, 0)
    assert trained_behind(method("modalprompt"), make_pool(3), keys).shape == (5, 2)


def test_the_evaluated_set_is_the_newest_the_tasks_own_or_the_only_one() -> None:
    scores = torch.zeros(2, 3)
    assert inserted(method("sequential"), scores).tolist() == [[2], [2]]
    assert inserted(method("independent"), scores, task=1).tolist() == [[1], [1]]
    assert inserted(method("joint"), torch.zeros(2, 1), task=1).tolist() == [[0], [0]]


def test_samples_of_several_tasks_are_chosen_for_together() -> None:
    tasks, pictured = torch.tensor([2, 0, 1]), torch.ones(3, dtype=torch.bool)
    own = method("independent").routing.inference(torch.zeros(3, 3), tasks, pictured)
    assert own.numbers.tolist() == [[2], [0], [1]]
    scores = torch.tensor([[0.1, 0.9, 0.85], [0.5, 0.1, 0.9], [0.3, 0.2, 0.9]])
    told = method("modalprompt", selection="oracle").routing.inference(scores, tasks, pictured)
    assert told.numbers.tolist() == [[0, 1, 2], [0, NO_SET, NO_SET], [0, 1, NO_SET]]


def test_a_gate_of_zero_trains_behind_no_set_less_similar_than_the_task_itself() -> None:
    _, keys = make_samples(6)
    selected = trained_behind(method("modalprompt", gate=0.0), make_pool(3), keys)
    assert (selected >= 0).sum() < 12  # random prototypes seldom beat the task's own


def test_some_carry_their_module_on_and_only_modalprompt_learns_prototypes() -> None:
    kinds = {name: registry.load("methods", name) for name in METHODS}
    assert {name for name, kind in kinds.items() if kind.carries_prompt} == CARRIED
    assert {name for name, kind in kinds.items() if kind.learns_prototypes} == {"modalprompt", "modular"}
    for name in METHODS:
        router = method(name).routing.router
        learned = router is not None and router.learned and router.learned_in == "head"
        assert method(name).learns_prototypes == learned


def test_what_a_stage_changes_of_earlier_tasks_is_said() -> None:
    assert {name: method(name).changes_earlier for name in METHODS} == {
        "modalprompt": "nothing",
        "sequential": "modules",
        "independent": "nothing",
        "joint": "nothing",
        "zero_shot": "nothing",
        "task_lora": "nothing",
        "lora": "modules",
        "lora_merged": "answers",
        "olora": "answers",
        "moelora": "modules",
        "hide": "answers",
        "disco": "nothing",
        "core_moe": "nothing",
        "ewc": "modules",
        "lwf": "modules",
        "modular": "nothing",
        "l2p": "modules",
        "dualprompt": "modules",
        "coda": "answers",
    }
    assert method("modalprompt", selection="all").changes_earlier == "answers"
    assert method("modalprompt", selection="current").changes_earlier == "answers"


def test_k_is_the_most_sets_in_training_and_at_inference() -> None:
    _, keys = make_samples(5)
    scores = torch.randn(5, 3)
    for k, earlier, most in ((1, 0, 1), (2, 1, 2), (3, 2, 3), (9, 3, 3)):
        assert trained_behind(method("modalprompt", k=k), make_pool(3), keys).shape == (5, earlier)
        assert inserted(method("modalprompt", k=k), scores).shape == (5, most)
        assert method("modalprompt", k=k).routing.rule.most(3) == most


def test_the_image_weight_decides_which_earlier_sets_are_most_similar() -> None:
    pool = PromptPool()
    for name, prototype in (("like the images", [1.0, 0.0]), ("like the texts", [0.0, 1.0])):
        pool.append(name, {"prompt": torch.zeros(4, 2)}, {"prototype": torch.tensor(prototype)})
    keys = Keys(torch.tensor([[1.0, 0.1]]), torch.tensor([[0.1, 1.0]]), torch.tensor([True]), {})
    assert trained_behind(method("modalprompt", k=2, image_weight=1.0), pool, keys).tolist() == [[0]]
    assert trained_behind(method("modalprompt", k=2, image_weight=0.0), pool, keys).tolist() == [[1]]


def test_selection_all_inserts_every_set_in_the_order_of_the_stages() -> None:
    _, keys = make_samples(2)
    everything = method("modalprompt", selection="all", k=1)
    assert trained_behind(everything, make_pool(3), keys).tolist() == [[0, 1, 2]] * 2
    assert inserted(everything, torch.randn(2, 3)).tolist() == [[0, 1, 2]] * 2


def test_selection_current_trains_a_set_alone_and_answers_with_the_newest() -> None:
    _, keys = make_samples(2)
    current = method("modalprompt", selection="current")
    assert trained_behind(current, make_pool(3), keys).shape == (2, 0)
    assert inserted(current, torch.randn(2, 3)).tolist() == [[2], [2]]


def test_selection_oracle_answers_behind_the_sets_the_task_was_trained_behind() -> None:
    _, keys = make_samples(6)
    pool = make_pool(3)
    scores = similarity(keys.image, keys.text, pool.prototypes, 0.5, keys.has_image)
    earlier = pool.picked([0, 1])
    for k in (1, 2, 3, 4):
        oracle = method("modalprompt", selection="oracle", k=k)
        trained = trained_behind(oracle, earlier, keys)
        own = torch.full((6, 1), 2)
        assert torch.equal(inserted(oracle, scores, task=2), torch.cat([trained, own], dim=1))
    assert inserted(method("modalprompt", selection="oracle"), scores).tolist() == [[0]] * 6


def test_the_oracles_gate_leaves_no_hole_before_the_own_set() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.85], [0.1, 0.1, 0.9]])
    oracle = method("modalprompt", selection="oracle", k=3, gate=0.1)
    assert inserted(oracle, scores, task=2).tolist() == [[1, 2, NO_SET], [2, NO_SET, NO_SET]]


def test_only_what_is_not_routed_has_to_be_told_the_task() -> None:
    told = {name for name in METHODS if method(name).needs_task}
    assert told == {"independent"}
    assert method("modalprompt", selection="oracle").needs_task


@pytest.mark.parametrize("name", ["modalprompt", "sequential", "joint"])
def test_skip_leaves_questions_without_an_image_without_sets(name: str) -> None:
    has_image, scores = torch.tensor([True, False]), torch.zeros(2, 1)
    assert inserted(method(name), scores, has_image=has_image).tolist() == [[0], [0]]
    assert inserted(method(name, text_only="skip"), scores, has_image=has_image).tolist() == [[0], [NO_SET]]


def test_an_unknown_method_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="Did you mean 'modalprompt'"):
        registry.load("methods", "modalpromt")


def test_options_of_learning_without_a_learned_router_are_refused() -> None:
    require_learnable(method("modalprompt", router="ridge"))
    require_learnable(method("modalprompt", prototype_weight=0.5))
    with pytest.raises(UserError, match=r"prototype_weight 0\.5 weighs a loss that only a learned router has"):
        require_learnable(method("modalprompt", router="ridge", prototype_weight=0.5))

    class Claims(type(method("independent"))):  # type: ignore[misc]
        learns_prototypes = True
        router = "ridge"
        rule = "hard"

    with pytest.raises(UserError, match="declares that it learns prototypes"):
        require_learnable(Claims(method_options(name="independent")))
    with pytest.raises(ValidationError, match="expected gate or share"):
        method_options(gate=0.1, share=0.5)
    changed = method_options(share=0.5).changed({"gate": 0.1}, 2)
    assert isinstance(changed, ModalPromptOptions) and (changed.gate, changed.share) == (0.1, None)


@pytest.mark.parametrize("router", ["mean", "centres", "ridge", {"name": "random_ridge", "width": 9, "seed": 3}])
def test_modalprompt_takes_any_router_and_its_options(router: Any) -> None:
    found = method("modalprompt", router=router, image_weight=0.25).routing.router
    assert found is not None and not found.learned and found.options.image_weight == 0.25
    with pytest.raises(UserError, match="router ridge has no option 'rigde'"):
        _ = method("modalprompt", router={"name": "ridge", "rigde": 1}).routing
