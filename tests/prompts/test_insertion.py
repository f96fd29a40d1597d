"""Prompt sets stand after the first token or before the image, whatever the padding and the number of sets."""

from __future__ import annotations

import torch

from pipeline.data.selection import NO_SET
from pipeline.prompts.insertion import gather_sets, insert_prompts, insertion_place

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
        [1, 100, 101, 102, 103, 2],
        [1, 104, 105, 2, 3],
    ]
    assert mask.tolist() == [[1] * 6 + [0], [1] * 5 + [0, 0]]


def test_a_batch_padded_on_the_left_stays_so() -> None:
    vectors, valid = gather_sets(BANK, torch.tensor([[0, 1], [2, NO_SET]]))
    embeddings, attention = tokens([[0, 1, 2], [1, 2, 3]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    mixed, mask, _ = insert_prompts(embeddings, attention, vectors, valid, left=True)
    assert [row[keep.bool(), 0].tolist() for row, keep in zip(mixed, mask, strict=True)] == [
        [1, 100, 101, 102, 103, 2],
        [1, 104, 105, 2, 3],
    ]
    assert mask.tolist() == [[0] + [1] * 6, [0, 0] + [1] * 5]


IMAGE = 9


def inserted(rows: list[list[int]], insertion: str, left: bool = False) -> list[list[int]]:
    """The rows (0 = padding, 9 = image token) with the sets 0 and 2 in every row, padding left out."""
    embeddings, attention = tokens(rows), torch.tensor(rows) != 0
    place = insertion_place(attention, torch.tensor(rows) == IMAGE, insertion)
    vectors, valid = gather_sets(BANK, torch.tensor([[0, 2]] * len(rows)))
    mixed, mask, _ = insert_prompts(embeddings, attention.long(), vectors, valid, left=left, place=place)
    assert mask.sum(1).tolist() == [sum(map(bool, row)) + 4 for row in rows]
    return [row[keep.bool(), 0].int().tolist() for row, keep in zip(mixed, mask, strict=True)]


def test_sets_stand_directly_before_the_first_image_token() -> None:
    rows = [[1, 2, 3, 9, 9, 4, 5], [1, 9, 9, 4, 0, 0, 0]]
    sets = [100, 101, 104, 105]
    assert inserted(rows, "before_image") == [[1, 2, 3, *sets, 9, 9, 4, 5], [1, *sets, 9, 9, 4]]
    assert inserted(rows, "after_bos") == [[1, *sets, 2, 3, 9, 9, 4, 5], [1, *sets, 9, 9, 4]]


def test_without_an_image_sets_before_the_image_follow_the_first_token() -> None:
    assert inserted([[1, 2, 3, 0], [1, 2, 9, 3]], "before_image") == [
        [1, 100, 101, 104, 105, 2, 3],
        [1, 2, 100, 101, 104, 105, 9, 3],
    ]


def test_sets_stand_before_the_image_when_padding_is_on_the_left() -> None:
    assert inserted([[0, 0, 1, 2, 9, 3], [1, 2, 3, 9, 9, 4]], "before_image", left=True) == [
        [1, 2, 100, 101, 104, 105, 9, 3],
        [1, 2, 3, 100, 101, 104, 105, 9, 9, 4],
    ]


def test_gradients_reach_the_inserted_sets_only_where_they_are_used() -> None:
    bank = BANK.clone().requires_grad_()
    vectors, valid = gather_sets(bank, torch.tensor([[0, NO_SET], [2, 0]]))
    mixed, mask, _ = insert_prompts(tokens([[1, 2], [1, 2]]), torch.ones(2, 2), vectors, valid)
    (mixed * mask[..., None]).sum().backward()
    assert bank.grad is not None
    assert bank.grad[:, 0, 0].tolist() == [2, 0, 1]
