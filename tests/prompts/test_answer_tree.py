"""How a head's probabilities multiply a decoder's, against sums over whole answers written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.prompts.answer_tree import DOUBT, AnswerTree, Branch, Mix, Weighing, branches, fit_mix

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
        ((), {1: 0.8, 4: 0.2}),
        ((1,), {2: 0.7 / 0.8, 3: 0.1 / 0.8}),
        ((1, 2), {END: 0.4 / 0.7, 5: 0.3 / 0.7}),
        ((1, 2, 5), {END: 1.0}),
    ],
)
def test_next_tokens_have_the_shares_of_the_answers_that_begin_so(
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
    assert float(found[2] / found[3]) == pytest.approx(float(decoder[2] / decoder[3]) ** 0.7 * 7.0**1.3, rel=1e-4)
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


def test_branches_end_where_an_answer_leaves_the_known_ones() -> None:
    logits = torch.randn(4, WORDS)
    known = list(branches(weighing(Mix()), (1, 2, END), logits))
    assert [(len(b.head), b.right) for b in known] == [(2, 0), (2, 0), (2, 1)]
    unknown = list(branches(weighing(Mix()), (1, 6, END), logits))
    assert [(len(b.head), b.right) for b in unknown] == [(2, 0), (2, 2)]
    expected = logits[1].softmax(0).tolist()
    assert np.exp(unknown[1].decoder) == pytest.approx(
        [expected[2], expected[3], 1 - expected[2] - expected[3]], rel=1e-4
    )


def drawn(seed: int, count: int, head: float, decoder: float) -> list[Branch]:
    """Tokens of which head and decoder know so much: scores of the right one are that much higher."""
    made, numbers = [], np.random.RandomState(seed)
    for _ in range(count):
        right = int(numbers.randint(4))
        own, said = numbers.randn(5), numbers.randn(4)
        own[right] += decoder
        said[right] += head
        made.append(Branch(own - np.log(np.exp(own).sum()), said - np.log(np.exp(said).sum()), right))
    return made


def test_the_mix_follows_what_each_of_them_knows() -> None:
    head, decoder = fit_mix(drawn(0, 300, 4.0, 0.0)), fit_mix(drawn(0, 300, 0.0, 4.0))
    assert head.head > 1.5 and head.decoder < 0.25 * head.head
    assert decoder.decoder > 1.5 and decoder.head < 0.25 * decoder.decoder
    assert head.known > 1  # every answer was among the known ones


def test_a_choice_of_one_says_nothing_of_the_powers() -> None:
    seen = [Branch(np.log([0.9, 0.1]), np.zeros(1), 0)] * 50
    found = fit_mix(seen)
    assert (found.decoder, found.head) == (1.0, 1.0) and found.known > 1


def test_answers_that_are_often_unknown_are_left_to_the_decoder() -> None:
    seen = [Branch(np.log([0.6, 0.2, 0.2]), np.log([0.9, 0.1]), right) for right in (0, 2, 2, 2) * 20]
    found = fit_mix(seen)
    odds = found.slope * math.log(4.0) + found.known
    assert 1 / (1 + math.exp(-odds)) == pytest.approx(0.25, abs=0.02)


def test_a_decoder_whose_odds_are_no_guide_leaves_the_share_of_known_tokens() -> None:
    """Its odds are worst where the token is a known one, so the slope would be negative: 9 in 10 tokens are known."""
    known = [Branch(np.log([0.001, 0.001, 0.998]), np.log([0.5, 0.5]), 0)] * 90
    unknown = [Branch(np.log([0.01, 0.01, 0.98]), np.log([0.5, 0.5]), 2)] * 10
    found = fit_mix(known + unknown)
    assert found.slope == 0.0
    assert 1 / (1 + math.exp(-found.known)) == pytest.approx(0.9, abs=0.01)


def test_the_other_power_is_fitted_anew_where_one_is_at_its_bound() -> None:
    seen = drawn(3, 200, 2.0, -1.0)  # the decoder's scores point away from the right token
    found = fit_mix(seen)
    assert found.decoder == 0.0

    def loss(head: float) -> float:
        shares = [head * b.head - np.log(np.exp(head * b.head).sum()) for b in seen]
        own = sum(share[b.right] for share, b in zip(shares, seen, strict=True))
        return float(0.5 * (head - 1.0) ** 2 - own)

    assert loss(found.head) < min(loss(found.head - 0.01), loss(found.head + 0.01))


def test_without_samples_both_count_as_they_are() -> None:
    assert fit_mix([]) == Mix()


def test_the_mix_is_the_maximum_that_an_optimiser_finds() -> None:
    seen = drawn(1, 60, 1.5, 1.0)
    seen += [Branch(branch.decoder, branch.head, len(branch.head)) for branch in drawn(2, 15, 0.0, 0.0)]
    found = fit_mix(seen)
    start, doubt = torch.tensor(Mix(), dtype=torch.float64), torch.tensor(DOUBT, dtype=torch.float64)
    values = start.clone().requires_grad_(True)
    optimiser = torch.optim.LBFGS([values], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = 0.5 * ((values - start) / doubt).square().sum()
        for branch in seen:
            own, said = torch.from_numpy(branch.decoder), torch.from_numpy(branch.head)
            odds = values[2] * (own[:-1].logsumexp(0) - own[-1]) + values[3]
            if branch.right == len(said):
                loss = loss - torch.nn.functional.logsigmoid(-odds)
            else:
                shares = (values[0] * own[:-1] + values[1] * said).log_softmax(0)
                loss = loss - torch.nn.functional.logsigmoid(odds) - shares[branch.right]
        loss.backward()
        return loss

    optimiser.step(closure)
    assert list(found) == pytest.approx(values.tolist(), abs=1e-3)
