"""Answer heads: the closed form against regressions made anew without each sample, states, and whose head counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.keys import Keys
from pipeline.data.selection import NO_SET, Selection
from pipeline.errors import UserError
from pipeline.prompts.answer_head import (
    PENALTIES,
    AnswerHead,
    AnswerHeads,
    _calibrated,
    _ridge,
    features,
    fit_head,
    head_of,
    require_fitting_heads,
    sound_head,
)
from pipeline.prompts.pool import PromptPool
from pipeline.prompts.routers import States
from pipeline.prompts.routers.kept_keys import picked, sound

TOKENS = [(1, 9), (2, 3, 9), (4, 9)]
WIDTH = 8


def drawn(count: int, seed: int = 0) -> tuple[Keys, Tensor]:
    """Keys of samples of three answers, one in five without an image."""
    numbers = torch.Generator().manual_seed(seed)
    answers = torch.arange(count) % 3
    centres = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(77))
    pictured = torch.arange(count) % 5 != 4
    image = (centres[answers] + 0.3 * torch.randn(count, WIDTH, generator=numbers)) * pictured[:, None]
    text = centres[answers].flip(1) + 0.3 * torch.randn(count, WIDTH, generator=numbers)
    return Keys(image, text, pictured, {}), answers


@pytest.mark.parametrize(("count", "width"), [(12, 20), (30, 6)], ids=["dual", "primal"])
def test_scores_without_a_sample_are_those_of_a_regression_without_it(count: int, width: int) -> None:
    numbers = torch.Generator().manual_seed(3)
    inputs, targets = torch.randn(count, width, generator=numbers), torch.eye(3)[torch.arange(count) % 3]
    seen: list[Tensor] = []

    def judged(alone: Tensor) -> tuple[float, float]:
        seen.append(alone)
        return float((alone - targets).square().mean()), float(len(seen) - 1)

    weights, middle, (_, number) = _ridge(inputs, targets, judged)
    bias, alone = targets.mean(0) - middle @ weights, seen[int(number)]
    # Which penalty was taken: the one whose regression these weights are.
    centred = (inputs - inputs.mean(0)).double().numpy()
    spread = (centred**2).sum() / width
    wanted = (targets - targets.mean(0)).double().numpy()
    solved = {
        p: np.linalg.solve(centred.T @ centred + p * spread * np.eye(width), centred.T @ wanted) for p in PENALTIES
    }
    taken = min(PENALTIES, key=lambda p: np.abs(solved[p] - weights.numpy()).max())
    assert solved[taken] == pytest.approx(weights.numpy(), abs=1e-4)
    assert (inputs @ weights + bias).mean(0).numpy() == pytest.approx(targets.mean(0).numpy(), abs=1e-5)
    for left in range(0, count, 5):
        kept = [n for n in range(count) if n != left]
        rest, own = inputs[kept].double().numpy(), targets[kept].double().numpy()
        moved = rest - rest.mean(0)
        # With the same penalty: leaving a sample out does not change it.
        without = np.linalg.solve(moved.T @ moved + taken * spread * np.eye(width), moved.T @ (own - own.mean(0)))
        expected = (inputs[left].double().numpy() - rest.mean(0)) @ without + own.mean(0)
        assert alone[left].numpy() == pytest.approx(expected, abs=1e-4)


def test_the_rate_is_the_one_of_the_smallest_loss_and_0_where_scores_are_wrong() -> None:
    numbers = torch.Generator().manual_seed(0)
    answers, share = torch.arange(60) % 3, torch.tensor([0.5, 0.3, 0.2])
    scores = 0.2 * torch.randn(60, 3, generator=numbers) + 0.2 * torch.eye(3)[answers]
    loss, rate = _calibrated(scores, share, answers)
    doubt = 1 / 62
    wanted = torch.eye(3)[answers] * (1 - doubt) + doubt * share

    def at(rate: float) -> float:
        return float(-(wanted * (share.log() + rate * scores).log_softmax(1)).sum(1).mean())

    assert loss == pytest.approx(at(rate), abs=1e-6) and 1.0 < rate < 20.0
    assert all(at(other) > loss for other in (0.9 * rate, 1.1 * rate, 0.0))
    assert _calibrated(-torch.eye(3)[answers], share, answers)[1] == 0.0
    assert _calibrated(torch.eye(3)[answers], share, answers)[1] < 100.0


def test_a_head_tells_answers_of_new_samples_apart_and_says_how_surely() -> None:
    head = fit_head(*_with_tokens(drawn(90)))
    keys, answers = drawn(60, seed=1)
    logs = head.log_probabilities(keys)
    assert float((logs.argmax(1) == answers).float().mean()) > 0.9
    assert logs.exp().sum(1).numpy() == pytest.approx(1.0, abs=1e-5)
    nothing = fit_head(keys, TOKENS, answers[torch.randperm(60, generator=torch.Generator().manual_seed(0))])
    assert float(nothing.log_probabilities(drawn(60, 2)[0]).exp().max(1).values.mean()) < 0.5
    assert float(logs.exp().max(1).values.mean()) > 0.8


def test_where_keys_tell_nothing_a_head_knows_how_often_each_answer_is_given() -> None:
    def unrelated(count: int, seed: int) -> tuple[Keys, Tensor]:
        numbers = torch.Generator().manual_seed(seed)
        answers = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), count, True, generator=numbers)
        image, text = torch.randn(2, count, 32, generator=numbers)
        return Keys(image, text, torch.ones(count, dtype=torch.bool), {}), answers

    keys, answers = unrelated(100, 0)
    found = fit_head(keys, TOKENS, answers).log_probabilities(unrelated(300, 1)[0])
    assert bool((found.argmax(1) == 0).all())
    assert found.exp().mean(0).numpy() == pytest.approx([0.7, 0.2, 0.1], abs=0.1)


def test_a_constant_key_adds_no_noise() -> None:
    keys, answers = drawn(60)
    text = torch.ones(60, WIDTH)
    head = fit_head(Keys(keys.image, text, keys.has_image, {}), TOKENS, answers)
    shaken = text + 1e-3 * torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(0))
    before, after = (features(Keys(keys.image, t, keys.has_image, {}), head.centre, head.scale) for t in (text, shaken))
    assert float((before - after).norm(dim=1).max()) < 0.1 * float(before.norm(dim=1).mean())


def test_states_hold_a_head_exactly_and_a_pool_tells_changed_ones_apart(tmp_path: Path) -> None:
    head = fit_head(*_with_tokens(drawn(30)))
    again = AnswerHead.of(head.state)
    keys = drawn(9, 5)[0]
    assert again is not None and again.tokens == head.tokens
    assert torch.allclose(again.log_probabilities(keys), head.log_probabilities(keys), atol=1e-5)
    assert AnswerHead.of({"prototype": torch.zeros(3)}) is None
    assert sound(head.state)
    pool = PromptPool()
    pool.append("a", {"prompt": torch.zeros(2, 4)}, {"prototype": torch.zeros(3)})
    pool.append("b", {"prompt": torch.zeros(2, 4)}, {"prototype": torch.zeros(3), **head.state})
    assert pool.fingerprint(0) != pool.fingerprint(1)
    pool.save(tmp_path / "pool.safetensors")
    found = PromptPool.load(tmp_path / "pool.safetensors")
    assert found.fingerprint(1) == pool.fingerprint(1)
    assert not head_of(found.states[0]) and all(torch.equal(v, found.states[1][n]) for n, v in head.state.items())


DAMAGES: dict[str, Callable[[Tensor], Tensor | None]] = {
    "tokens": lambda value: value + 0.5,
    "tokens, none": lambda value: value[:0],
    "tokens, another number": lambda value: value[:2],
    "tokens, one row": lambda value: value[0],
    "tokens, a gap": lambda value: value.flip(1),
    "tokens, no numbers of a type that counts": lambda value: value > 0,
    "centre": lambda value: value[:-2],
    "centre, a matrix": lambda value: value[None],
    "scale": lambda value: value * 0,
    "scale, another width": lambda value: value[:-1],
    "weights": lambda value: value[:-1],
    "weights, of other answers": lambda value: value[:, :2],
    "bias": lambda value: value[:1],
    "bias, missing": lambda value: None,
    "mix": lambda value: value[:3],
    "mix, more": lambda value: torch.cat([value, value]),
    "mix, a negative power": lambda value: value - 5.0,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_head_is_not_sound(damage: str) -> None:
    state = {"prototype": torch.zeros(3), **fit_head(*_with_tokens(drawn(30))).state}
    assert sound_head(state)
    name = f"answers.{damage.partition(',')[0]}"
    changed = DAMAGES[damage](state[name])
    if changed is None:
        del state[name]
    else:
        state[name] = changed
    assert not sound_head(state)


def test_a_state_without_a_head_is_sound_and_one_without_its_tokens_is_not() -> None:
    state = fit_head(*_with_tokens(drawn(30))).state
    assert sound_head({"prototype": torch.zeros(3)})
    assert not sound_head({name: value for name, value in state.items() if name != "answers.tokens"})
    assert not sound_head({**state, "answers.more": torch.zeros(1)})


def test_a_head_for_another_vocabulary_or_other_keys_is_refused() -> None:
    states = States([{"prototype": torch.zeros(3)}, fit_head(*_with_tokens(drawn(30))).state])
    require_fitting_heads(states, ["a", "b"], 10, WIDTH)
    with pytest.raises(UserError, match=r"head of 'b' has tokens up to 9 .* expected tokens below 9,"):
        require_fitting_heads(states, ["a", "b"], 9, WIDTH)
    with pytest.raises(UserError, match=r"reads 17 numbers .* and 15 numbers"):
        require_fitting_heads(states, ["a", "b"], 10, WIDTH - 1)


def test_the_head_of_a_sample_s_own_module_weighs_its_answer() -> None:
    first, second = fit_head(*_with_tokens(drawn(30))), fit_head(*_with_tokens(drawn(30, 9)))
    states = States([first.state, {"prototype": torch.zeros(3)}, second.state])
    keys = drawn(6, 4)[0]
    numbers = torch.tensor([[0, NO_SET], [2, 0], [1, NO_SET], [NO_SET, NO_SET], [0, 2], [1, 2]])

    def heads(selection: Selection, samples: list[int]) -> list[Tensor | None]:
        made = AnswerHeads(states, keys, selection).weighing(samples)
        return [None if one is None else torch.from_numpy(one._logs) for one in made]

    found = heads(Selection(numbers), list(range(6)))
    for place, head in enumerate((first, first, None, None, second, second)):
        if head is None:
            assert found[place] is None
        else:
            expected = head.log_probabilities(picked(keys, torch.tensor([place])))[0]
            torch.testing.assert_close(found[place], expected)
    alone = heads(Selection(numbers), [4])
    torch.testing.assert_close(alone[0], found[4])  # whatever else is in the batch
    weighted = heads(
        Selection(numbers, torch.tensor([[1.0, 0], [0.7, 0.3], [1, 0], [0, 0], [0.5, 0.5], [0.2, 0.8]])), [1]
    )
    torch.testing.assert_close(weighted[0], second.log_probabilities(picked(keys, torch.tensor([1])))[0])


def _with_tokens(samples: tuple[Keys, Tensor]) -> tuple[Keys, list[tuple[int, ...]], Tensor]:
    return samples[0], TOKENS, samples[1]
