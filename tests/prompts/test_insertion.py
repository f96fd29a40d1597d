"""Prompt sets stand directly after the first token, whatever the padding and the number of sets."""

from __future__ import annotations

import torch

from pipeline.prompts.insertion import gather_sets, insert_prompts
from pipeline.prompts.routing import NO_SET

BANK = torch.arange(3 * 2).reshape(3, 2, 1).float() + 100  # sets [100, 101], [102, 103], [104, 105]


def tokens(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows)[..., None].float()


def test_sets_follow_the_first_token_in_the_given_order() -> None:
    vectors, valid = gather_sets(BANK, torch.tensor([[2, 0]]))
    mixed, attention, _ = insert_prompts(tokens([[1, 2, 3]]), torch.ones(1, 3), vectors, valid)
    assert mixed[0, :, 0].tolist() == [1, 104, 105, 100, 101, 2, 3]
    assert attention.tolist() == [[1] * 7]


def test_prompts_have_no_labels_and_answers_keep_theirs() -> None:
    vectors, valid = gather_sets(BANK, torch.tensor([[1]]))
    labels = torch.tensor([[-100, -100, 7]])
    _, _, moved = insert_prompts(tokens([[1, 2, 3]]), torch.ones(1, 3), vectors, valid, labels)
    assert moved is not None
    assert moved.tolist() == [[-100, -100, -100, -100, 7]]


def test_the_sequence_grows_by_the_number_of_sets_times_their_length() -> None:
    for selected in ([], [0], [0, 1], [0, 1, 2]):
        vectors, valid = gather_sets(BANK, torch.tensor([selected], dtype=torch.long))
        _, attention, _ = insert_prompts(tokens([[1, 2, 3]]), torch.ones(1, 3), vectors, valid)
        assert int(attention.sum()) == 3 + 2 * len(selected)


def test_samples_may_have_different_numbers_of_sets_and_tokens() -> None:
    vectors, valid = gather_sets(BANK, torch.tensor([[0, 1], [2, NO_SET]]))
    embeddings, attention = tokens([[1, 2, 0], [1, 2, 3]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    mixed, mask, _ = insert_prompts(embeddings, attention, vectors, valid)
    assert [row[keep.bool(), 0].tolist() for row, keep in zip(mixed, mask, strict=True)] == [
        [1, 100, 101, 102, 103, 2], [1, 104, 105, 2, 3],
    ]  # fmt: skip
    assert mask.tolist() == [[1] * 6 + [0], [1] * 5 + [0, 0]]


def test_a_batch_padded_on_the_left_stays_so() -> None:
    vectors, valid = gather_sets(BANK, torch.tensor([[0, 1], [2, NO_SET]]))
    embeddings, attention = tokens([[0, 1, 2], [1, 2, 3]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    mixed, mask, _ = insert_prompts(embeddings, attention, vectors, valid, left=True)
    assert [row[keep.bool(), 0].tolist() for row, keep in zip(mixed, mask, strict=True)] == [
        [1, 100, 101, 102, 103, 2], [1, 104, 105, 2, 3],
    ]  # fmt: skip
    assert mask.tolist() == [[0] + [1] * 6, [0, 0] + [1] * 5]


def test_gradients_reach_the_inserted_sets_only_where_they_are_used() -> None:
    bank = BANK.clone().requires_grad_()
    vectors, valid = gather_sets(bank, torch.tensor([[0, NO_SET], [2, 0]]))
    mixed, mask, _ = insert_prompts(tokens([[1, 2], [1, 2]]), torch.ones(2, 2), vectors, valid)
    (mixed * mask[..., None]).sum().backward()
    assert bank.grad is not None
    assert bank.grad[:, 0, 0].tolist() == [2, 0, 1]
