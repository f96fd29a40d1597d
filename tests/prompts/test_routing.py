"""Which sets a sample gets, and in which order (docs/design.md 4.5, 4.6)."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from pipeline.data.selection import NO_SET
from pipeline.prompts.routers.mean import provisional_prototype, similarity
from pipeline.prompts.rules.top_k import select_for_inference, select_for_training


def test_similarity_is_the_mean_of_both_cosines() -> None:
    image, text, prototypes = torch.randn(3, 5), torch.randn(3, 5), torch.randn(2, 5)
    expected = 0.5 * (
        cosine_similarity(image[:, None], prototypes[None], dim=-1)
        + cosine_similarity(text[:, None], prototypes[None], dim=-1)
    )
    torch.testing.assert_close(similarity(image, text, prototypes), expected)


def test_a_sample_without_an_image_is_compared_by_its_text_alone() -> None:
    image, text, prototypes = torch.randn(2, 5), torch.randn(2, 5), torch.randn(3, 5)
    found = similarity(image, text, prototypes, 0.5, torch.tensor([True, False]))
    torch.testing.assert_close(found[1], cosine_similarity(text[1][None], prototypes, dim=-1))
    torch.testing.assert_close(found[0], similarity(image, text, prototypes)[0])


@pytest.mark.parametrize(("weight", "key"), [(1.0, "image"), (0.0, "text")])
def test_the_image_weight_can_leave_out_either_key(weight: float, key: str) -> None:
    keys = {"image": torch.randn(2, 5), "text": torch.randn(2, 5)}
    prototypes = torch.randn(3, 5)
    expected = cosine_similarity(keys[key][:, None], prototypes[None], dim=-1)
    torch.testing.assert_close(similarity(keys["image"], keys["text"], prototypes, weight), expected)


def test_training_on_the_first_task_has_no_earlier_set() -> None:
    assert select_for_training(torch.zeros(4, 0), k=3).shape == (4, 0)


def test_training_on_the_second_task_inserts_the_first_set() -> None:
    assert select_for_training(torch.tensor([[-0.9], [0.9]]), k=3).tolist() == [[0], [0]]


def test_training_on_the_third_task_orders_both_sets_by_similarity() -> None:
    assert select_for_training(torch.tensor([[0.1, 0.2], [0.4, 0.3]]), k=3).tolist() == [[0, 1], [1, 0]]


def test_training_on_the_fourth_task_selects_the_two_most_similar_least_similar_first() -> None:
    scores = torch.tensor([[0.1, 0.3, 0.2], [0.9, 0.1, 0.8]])
    assert select_for_training(scores, k=3).tolist() == [[2, 1], [2, 0]]


def test_fewer_earlier_sets_than_places_stand_in_their_natural_order() -> None:
    assert select_for_training(torch.tensor([[0.9, 0.1]]), k=4).tolist() == [[0, 1]]


def test_k_of_one_trains_the_current_set_alone() -> None:
    assert select_for_training(torch.tensor([[0.9, 0.1]]), k=1).shape == (1, 0)


def test_the_gate_leaves_out_earlier_sets_far_below_the_current_task() -> None:
    scores = torch.tensor([[0.5, 0.45, 0.1], [0.5, 0.45, 0.1], [0.5, 0.45, 0.1]])
    reference = torch.tensor([0.5, 0.58, 0.9])
    found = select_for_training(scores, k=4, gate=0.1, reference=reference)
    assert found.tolist() == [[1, 0, NO_SET], [0, NO_SET, NO_SET], [NO_SET, NO_SET, NO_SET]]


def test_inference_selects_the_k_best_of_all_sets_least_similar_first() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert select_for_inference(scores, k=3).tolist() == [[2, 3, 1]]
    assert select_for_inference(scores[:, :2], k=3).tolist() == [[0, 1]]
    assert select_for_inference(scores[:, :1], k=3).tolist() == [[0]]


def test_the_gate_keeps_the_best_set_at_inference_and_those_near_it() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.35], [0.9, 0.2, 0.1]])
    assert select_for_inference(scores, k=3, gate=0.1).tolist() == [[2, 1, NO_SET], [0, NO_SET, NO_SET]]
    assert select_for_inference(scores, k=3, gate=0.0).tolist() == [[1, NO_SET, NO_SET], [0, NO_SET, NO_SET]]


def test_shuffling_the_batch_permutes_the_selection() -> None:
    scores, order = torch.randn(8, 5), torch.randperm(8)
    for gate in (None, 0.5):
        assert torch.equal(select_for_training(scores[order], 3, gate), select_for_training(scores, 3, gate)[order])
        assert torch.equal(select_for_inference(scores[order], 3, gate), select_for_inference(scores, 3, gate)[order])


def test_the_provisional_prototype_minimises_the_prototype_loss() -> None:
    torch.manual_seed(0)
    image, text = torch.randn(20, 6) + 1, torch.randn(20, 6) + 1
    has_image = torch.arange(20) % 5 > 0

    def loss(prototype: torch.Tensor) -> torch.Tensor:
        terms_image = (1 - cosine_similarity(image, prototype[None], dim=-1)) * has_image
        terms_text = (1 - cosine_similarity(text, prototype[None], dim=-1)) * (2 - has_image.float())
        return (terms_image + terms_text).mean()

    best = provisional_prototype(image, text, has_image).requires_grad_()
    loss(best).backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-6
    assert all(loss(best) < loss(best + 0.1 * torch.randn(6)) for _ in range(20))
