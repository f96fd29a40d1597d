"""How much decoder and head count, by what held-out answers say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from pipeline.prompts.answer_mix import DOUBT, Branch, HeldOut, Mix, fit_mix


def fitted(seen: Sequence[Branch]) -> Mix:
    """To answers of one token each, none of which is right as a whole, so that the decoder keeps its power."""
    return fit_mix([HeldOut([branch], spelt=False) for branch in seen])


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
    head, decoder = fitted(drawn(0, 300, 4.0, 0.0)), fitted(drawn(0, 300, 0.0, 4.0))
    assert head.head > 1.5 and head.decoder < 0.25 * head.head
    assert decoder.decoder > 1.5 and decoder.head < 0.25 * decoder.decoder
    assert head.known > 1  # every answer was among the known ones


def test_a_choice_of_one_says_nothing_of_the_powers() -> None:
    seen = [Branch(np.log([0.9, 0.1]), np.zeros(1), 0)] * 50
    found = fitted(seen)
    assert (found.decoder, found.head) == (1.0, 1.0) and found.known > 1


def test_answers_that_are_often_unknown_are_left_to_the_decoder() -> None:
    seen = [Branch(np.log([0.6, 0.2, 0.2]), np.log([0.9, 0.1]), right) for right in (0, 2, 2, 2) * 20]
    found = fitted(seen)
    odds = found.slope * math.log(4.0) + found.known
    assert 1 / (1 + math.exp(-odds)) == pytest.approx(0.25, abs=0.02)


def test_a_decoder_whose_odds_are_no_guide_leaves_the_share_of_known_tokens() -> None:
    """Its odds are worst where the token is a known one, so the slope would be negative: 9 in 10 tokens are known."""
    known = [Branch(np.log([0.001, 0.001, 0.998]), np.log([0.5, 0.5]), 0)] * 90
    unknown = [Branch(np.log([0.01, 0.01, 0.98]), np.log([0.5, 0.5]), 2)] * 10
    found = fitted(known + unknown)
    assert found.slope == 0.0
    assert 1 / (1 + math.exp(-found.known)) == pytest.approx(0.9, abs=0.01)


def test_the_other_power_is_fitted_anew_where_one_is_at_its_bound() -> None:
    seen = drawn(3, 200, 2.0, -1.0)  # the decoder's scores point away from the right token
    found = fitted(seen)
    assert found.decoder == 0.0

    def loss(head: float) -> float:
        shares = [head * b.head - np.log(np.exp(head * b.head).sum()) for b in seen]
        own = sum(share[b.right] for share, b in zip(shares, seen, strict=True))
        return float(0.5 * (head - 1.0) ** 2 - own)

    assert loss(found.head) < min(loss(found.head - 0.01), loss(found.head + 0.01))


def test_without_samples_both_count_as_they_are() -> None:
    assert fit_mix([]) == Mix()


def test_a_decoder_that_spells_but_cannot_choose_counts_less() -> None:
    """Answers of five tokens: at the first the head knows more, at the others the decoder, and these are most."""
    numbers, answers = np.random.RandomState(0), list[HeldOut]()
    for _ in range(100):
        first = drawn(int(numbers.randint(1 << 30)), 1, 2.0, 0.0)
        later = drawn(int(numbers.randint(1 << 30)), 4, 0.0, 9.0)
        answers.append(HeldOut([*first, *(Branch(b.decoder, np.zeros(4), b.right) for b in later)], spelt=True))
    together = fitted([branch for answer in answers for branch in answer.branches])
    found = fit_mix(answers)
    assert 0.0 < found.decoder < together.decoder
    assert (found.head, found.slope, found.known) == (together.head, together.slope, together.known)
    right = {
        share: sum(a.right_by(together._replace(decoder=share * together.decoder)) for a in answers)
        for share in (1.0, 0.5, 0.25, 0.0)
    }
    assert sum(a.right_by(found) for a in answers) == max(right.values()) > right[1.0]


def test_of_shares_with_as_many_right_answers_the_decoder_keeps_the_largest() -> None:
    seen = drawn(5, 50, 3.0, 3.0)
    assert fit_mix([HeldOut([branch], spelt=False) for branch in seen]).decoder > 0
    certain = [HeldOut([Branch(np.log([0.97, 0.02, 0.01]), np.log([0.99, 0.01]), 0)], spelt=True)] * 20
    assert fit_mix(certain).decoder == fitted([answer.branches[0] for answer in certain]).decoder


def test_the_mix_is_the_maximum_that_an_optimiser_finds() -> None:
    seen = drawn(1, 60, 1.5, 1.0)
    seen += [Branch(branch.decoder, branch.head, len(branch.head)) for branch in drawn(2, 15, 0.0, 0.0)]
    found = fitted(seen)
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
