"""The learning rate over the steps of a stage, and what a new prompt set starts from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.models import ModelConfig
from pipeline.config.train import TrainConfig
from pipeline.prompts.learner import prompt_learner
from pipeline.prompts.parts.input_rows import usable_rows
from pipeline.training.schedule import schedule, total_steps
from tests.training.worlds import KEY_WIDTH


def factors(total: int = 100, **fields: Any) -> list[float]:
    config = TrainConfig(lr_prompt=1.0, lr_head=1.0, **fields)
    return [schedule(config, step, total) for step in range(total)]


def test_the_warm_up_rises_linearly_to_the_full_rate() -> None:
    assert factors(warmup=0.05, schedule="constant")[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_the_constant_schedule_stays_at_the_full_rate() -> None:
    assert set(factors(warmup=0.0, schedule="constant")) == {1.0}


def test_the_linear_schedule_falls_evenly_towards_zero() -> None:
    found = factors(warmup=0.2, schedule="linear")
    assert found[20] == 1.0
    assert found[60] == pytest.approx(0.5)
    assert found[99] == pytest.approx(1 / 80)


def test_the_cosine_schedule_falls_along_half_a_cosine() -> None:
    found = factors(warmup=0.2, schedule="cosine")
    assert found[40] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert found[60] == pytest.approx(0.5)
    assert found[99] < 0.001


@pytest.mark.parametrize("total", [30, 100, 1000])
def test_the_logarithmic_warm_up_is_deepspeeds(total: int) -> None:
    from deepspeed.runtime.lr_schedules import WarmupLR

    warmup = math.ceil(0.03 * total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = WarmupLR(optimizer, warmup_max_lr=1.0, warmup_num_steps=warmup)
    expected = []
    for _ in range(total):
        reference.step()
        expected.append(reference.get_last_lr()[0])
    found = factors(total, warmup=0.03, warmup_curve="log", schedule="constant")
    if warmup > 1:  # DeepSpeed warms up for two steps at least
        assert found == pytest.approx(expected)
    assert found != factors(total, warmup=0.03, schedule="constant")


def test_steps_override_epochs() -> None:
    assert total_steps(TrainConfig(lr_prompt=1, lr_head=1, epochs=2.5), 10) == 25
    assert total_steps(TrainConfig(lr_prompt=1, lr_head=1, epochs=2.5, steps=7), 10) == 7


@pytest.fixture(scope="module")
def lmm(llava: Path) -> LMM:
    return load_lmm(ModelConfig(path=str(llava)))


def started(
    lmm: LMM, init: str, seed: int, stage: int, previous: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """The prompt set that a stage starts from."""
    return prompt_learner(lmm, 6, KEY_WIDTH, init=init).start(lmm, seed, stage, previous)["prompt"]


def test_vocab_rows_are_rows_of_ordinary_words(lmm: LMM) -> None:
    table = lmm.vocabulary_rows(usable_rows(lmm))
    assert all((table == row).all(dim=1).any() for row in started(lmm, "vocab_rows", 0, 0))


def test_normal_vectors_have_a_deviation_of_two_hundredths(lmm: LMM) -> None:
    prompt = started(lmm, "normal", 0, 0)
    assert prompt.std() == pytest.approx(0.02, rel=0.15)
    table = lmm.vocabulary_rows(usable_rows(lmm))
    assert not any((table == row).all(dim=1).any() for row in prompt)


def test_previous_starts_from_the_set_before_and_in_the_first_stage_from_words(lmm: LMM) -> None:
    before = torch.randn(6, lmm.width)
    assert torch.equal(started(lmm, "previous", 0, 1, {"prompt": before}), before)
    assert torch.equal(started(lmm, "previous", 0, 0), started(lmm, "vocab_rows", 0, 0))


@pytest.mark.parametrize("init", ["vocab_rows", "normal"])
def test_a_start_depends_on_seed_and_stage_alone(lmm: LMM, init: str) -> None:
    start = started(lmm, init, 3, 2)
    assert torch.equal(start, started(lmm, init, 3, 2))
    assert not torch.equal(start, started(lmm, init, 4, 2))
    assert not torch.equal(start, started(lmm, init, 3, 1))
