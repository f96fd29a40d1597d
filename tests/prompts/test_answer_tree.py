"""How a head's probabilities multiply a decoder's, against what is written out here for four known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.prompts.answer_mix import Mix
from pipeline.prompts.answer_tree import AnswerTree, Weighing, said_along

END, WORDS = 9, 10
KNOWN = [(1, 2, END), (1, 3, END), (4, END), (1, 2, 5, END)]
SHARES = np.array([0.4, 0.1, 0.2, 0.3])


def weighing(mix: Mix) -> Weighing:
    return Weighing(AnswerTree(KNOWN), np.log(SHARES).astype(np.float32), mix)


def weighed(mix: Mix, so_far: tuple[int, ...], scores: torch.Tensor) -> torch.Tensor:
    return Weighing.weighed([weighing(mix)], [so_far], scores[None])[0]


@pytest.mark.parametrize(
    ("so_far", "expected"),
    [
        ((), {1: 1.0, 4: 0.2 / 0.4}),
        ((1,), {2: 1.0, 3: 0.1 / 0.4}),
        ((1, 2), {END: 1.0, 5: 0.3 / 0.4}),
        ((1, 2, 5), {END: 1.0}),
    ],
)
def test_a_next_token_counts_as_the_most_probable_answer_behind_it(
    so_far: tuple[int, ...], expected: dict[int, float]
) -> None:
    found = weighing(Mix()).next(so_far)
    assert found is not None
    assert dict(zip(found[0].tolist(), np.exp(found[1]).tolist(), strict=True)) == pytest.approx(expected)


@pytest.mark.parametrize("so_far", [(5,), (1, 4), (1, 2, END), (4, 4, 4, 4, 4)])
def test_an_answer_that_leaves_the_known_ones_is_the_decoder_s_alone(so_far: tuple[int, ...]) -> None:
    scores = torch.randn(WORDS)
    assert weighing(Mix(0.5, 2.0, 1.0, 3.0)).next(so_far) is None
    assert torch.equal(weighed(Mix(0.5, 2.0, 1.0, 3.0), so_far, scores), scores)


def test_a_head_without_weight_changes_nothing() -> None:
    scores = torch.randn(WORDS) * 3
    found = weighed(Mix(head=0.0), (1,), scores)
    torch.testing.assert_close(found, scores)  # so that a penalty on logits counts as it does without a head


def test_known_tokens_together_follow_the_decoder_and_each_of_them_both() -> None:
    scores, mix = torch.randn(WORDS, generator=torch.Generator().manual_seed(0)) * 2, Mix(0.7, 1.3, 0.5, 0.8)
    logits = weighed(mix, (1,), scores)
    assert float(logits.logsumexp(0)) == pytest.approx(float(scores.logsumexp(0)), abs=1e-5)
    found = logits.softmax(0)
    decoder = scores.softmax(0)
    others = [token for token in range(WORDS) if token not in (2, 3)]
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(found[2] / found[3]) == pytest.approx(float(decoder[2] / decoder[3]) ** 0.7 * 4.0**1.3, rel=1e-4)
    together = float(decoder[others].sum())
    odds = ((1 - together) / together) ** 0.5 * math.exp(0.8)
    assert float(found[[2, 3]].sum()) == pytest.approx(odds / (1 + odds), rel=1e-4)
    torch.testing.assert_close(found[others] / found[others].sum(), decoder[others] / together)


def test_rows_of_a_batch_are_weighed_as_each_alone() -> None:
    scores = torch.randn(5, WORDS, generator=torch.Generator().manual_seed(1)) * 2
    so_far = [(), (1,), (5,), (1, 2, 5), (4,)]
    mixes = [Mix(), Mix(0.5, 2.0, 0.3, -1.0), Mix(), Mix(0.0, 1.0, 1.0, 2.0), Mix(1.0, 0.0, 1.0, 0.0)]
    together = Weighing.weighed([weighing(mix) for mix in mixes], so_far, scores)
    for row, mix in enumerate(mixes):
        torch.testing.assert_close(together[row], weighed(mix, so_far[row], scores[row]))


def test_a_head_alone_gives_its_most_probable_answer() -> None:
    """Two answers that begin alike are together more probable than it, and neither of them alone."""
    shares = np.array([0.3, 0.3, 0.4, 1e-9])
    row = Weighing(AnswerTree(KNOWN), np.log(shares).astype(np.float32), Mix(decoder=0.0, known=30.0))
    scores, so_far = torch.randn(WORDS, generator=torch.Generator().manual_seed(2)), list[int]()
    while not so_far or so_far[-1] != END:
        so_far.append(int(Weighing.weighed([row], [so_far], scores[None])[0].argmax()))
    assert tuple(so_far) == (4, END)


def test_branches_end_where_an_answer_leaves_the_known_ones() -> None:
    logits = torch.randn(4, WORDS)
    known = said_along(weighing(Mix()), (1, 2, END), logits)
    assert [(len(b.head), b.right, b.unknown) for b in known.branches] == [(2, 0, False), (2, 0, False), (2, 1, False)]
    unknown = said_along(weighing(Mix()), (1, 6, END), logits)
    assert [(len(b.head), b.right, b.unknown) for b in unknown.branches] == [(2, 0, False), (2, 2, True)]
    expected = logits[1].softmax(0)
    said = unknown.branches[1]
    together = 1 - float(expected[2] + expected[3])
    assert np.exp(said.decoder) == pytest.approx([float(expected[2]), float(expected[3]), together], rel=1e-4)
    rest = max(float(p) for token, p in enumerate(expected) if token not in (2, 3))
    assert math.exp(said.other) == pytest.approx(rest / together, rel=1e-4)


def test_an_answer_is_right_along_its_tokens_where_greedy_decoding_gives_it() -> None:
    """Decoding gives an answer exactly where each of its tokens is the most probable one behind those before it."""
    right = list[bool]()
    for mix in (Mix(), Mix(0.0, 1.0, 1.0, 4.0), Mix(1.0, 0.0, 1.0, 0.0), Mix(0.5, 2.0, 0.5, -3.0)):
        for answer in ((1, 2, END), (4, END), (1, 6, END), (5, 6, 7, END), (1, 2, 5, END)):
            for seed in range(20):
                logits = torch.randn(len(answer), WORDS, generator=torch.Generator().manual_seed(seed)) * 2
                logits[torch.arange(len(answer)), torch.tensor(answer)] += 3.0
                best = [int(weighed(mix, answer[:place], row).argmax()) for place, row in enumerate(logits)]
                right.append(best == list(answer))
                assert said_along(weighing(mix), answer, logits).right_by(mix) is right[-1]
    assert 0.1 < np.mean(right) < 0.8
