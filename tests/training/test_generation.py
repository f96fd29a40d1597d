"""How answers are generated: from samples that are decoded once, in an order that needs no decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backbones.lmm import LMM, load_lmm
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Examples
from pipeline.data.conversation import Conversation
from pipeline.data.example import Example
from pipeline.data.prompt_lengths import prompt_lengths
from pipeline.data.sample import Sample
from pipeline.data.stage_data import StageData
from pipeline.prompts import generation
from pipeline.prompts.generation import Conditions, Decoding, generate_answers, prompt_sets
from tests.training.worlds import make_pool, make_samples

SELECTED = torch.tensor([[0, 1], [2, 0], [1, -1], [-1, -1], [2, 1], [0, 2], [0, 1]])
COUNT = len(SELECTED)


@pytest.fixture(scope="module")
def lmm(llava: Path) -> LMM:
    return load_lmm(ModelConfig(path=str(llava)))


@pytest.fixture
def examples(lmm: LMM) -> Examples:
    data = StageData([(*make_samples(COUNT, text_only=(1, 4)), None)])
    return Examples(data, lmm.conversation, once=True)


def answers(lmm: LMM, examples: Examples, batch: int = 2, **conditions: Any) -> dict[int, str]:
    inserted = prompt_sets(make_pool(3).prompts, SELECTED)
    return generate_answers(lmm, examples, range(COUNT), inserted, Decoding(6, batch), Conditions(**conditions))


def test_loader_processes_change_no_answer(lmm: LMM, examples: Examples) -> None:
    alone = answers(lmm, examples)
    assert len(set(alone.values())) > 1
    assert answers(lmm, examples, workers=2) == alone


def test_every_image_is_decoded_once(lmm: LMM, examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    make = Conversation.example

    def counted(self: Conversation, sample: Sample, *others: Any) -> Example:
        decoded.append(sample.id)
        return make(self, sample, *others)

    monkeypatch.setattr(Conversation, "example", counted)
    answers(lmm, examples)
    assert sorted(decoded) == sorted(examples.data.ids)


def test_every_sample_is_told_to_the_watchdog_before_the_next_is_decoded(
    lmm: LMM, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    make = Conversation.example

    def slow(self: Conversation, sample: Sample, *others: Any) -> Example:
        events.append("decoded")
        return make(self, sample, *others)

    monkeypatch.setattr(Conversation, "example", slow)
    answers(lmm, examples, progress=lambda: events.append("progress"))
    decoded = [place for place, event in enumerate(events) if event == "decoded"]
    assert all(events[place + 1] == "progress" for place in decoded)
    assert events[-1] == "progress"


def test_whoever_is_told_to_stop_decodes_nothing_more(lmm: LMM, examples: Examples) -> None:
    asked = iter([True, False])
    made: list[None] = []
    given = answers(lmm, examples, go_on=lambda: next(asked), progress=lambda: made.append(None))
    assert len(given) == 2
    assert len(made) == 3  # two samples and their answers


def test_lengths_are_known_without_reading_a_sample(examples: Examples, monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(self: StageData, index: int) -> Sample:
        raise AssertionError(f"sample {index} was read")

    monkeypatch.setattr(StageData, "__getitem__", unread)
    monkeypatch.setattr(StageData, "text", unread)
    lengths = prompt_lengths(examples, range(COUNT))
    pictured = examples.data.keys.has_image.numpy()
    assert lengths[pictured].min() > lengths[~pictured].max()


def test_the_longest_prompts_are_answered_first(examples: Examples) -> None:
    order = generation._ordered(examples, range(COUNT), SELECTED, 4)
    lengths = prompt_lengths(examples, range(COUNT)) + 4 * (SELECTED != -1).sum(1).numpy()
    assert np.all(np.diff(lengths[order]) <= 0)
    assert sorted(order) == list(range(COUNT))


def test_few_samples_wait_in_memory_where_they_are_large(
    lmm: LMM, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[int] = []

    def watched(data: Examples, numbers: list[int], workers: int, ahead_: int = 0, **named: int) -> Any:
        ahead.append(named["ahead"])
        return (data[number] for number in numbers)

    monkeypatch.setattr(generation, "loaded", watched)
    answers(lmm, examples, batch=6, workers=2)
    monkeypatch.setattr(generation, "WAITING_BYTES", 1)
    answers(lmm, examples, batch=6, workers=2)
    assert ahead == [3, 1]
