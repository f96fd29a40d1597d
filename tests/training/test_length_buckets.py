"""Batches of samples of about the same length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.backbones.lmm import load_processor
from pipeline.config.models import ModelConfig
from pipeline.data.collate import Examples, collate
from pipeline.data.conversation import Conversation
from pipeline.data.order import Order
from pipeline.data.stage_data import StageData
from pipeline.sequence import data as run_data
from pipeline.sequence import run as sequence
from tests.e2e.conftest import recipe_on
from tests.training.worlds import make_recipe, make_samples

COUNT, BATCH = 40, 4
WITHOUT = tuple(range(0, COUNT, 2))  # every second question has no image, as in ScienceQA


@pytest.fixture(scope="module")
def data() -> StageData:
    return StageData([(*make_samples(COUNT, text_only=WITHOUT), None)])


def test_an_epoch_has_less_padding_and_every_sample_once(data: StageData, llava: Path) -> None:
    examples = Examples(data, Conversation(load_processor(ModelConfig(path=str(llava))), 200))

    def padding(order: Order) -> int:
        seen: list[str] = []
        wasted = 0
        for number in range(order.batches_per_epoch):
            indices, weights = order.batch(0, number)
            batch = collate(examples, indices.tolist(), weights.tolist(), torch.zeros(0, 0))
            wasted += int((batch.attention == 0).sum())
            seen += batch.ids
        assert sorted(seen) == sorted(data.ids)
        return wasted

    plain, sorted_ = (Order(COUNT, BATCH, 0, 0, lengths) for lengths in (None, data.lengths()))
    assert padding(sorted_) < padding(plain) / 4


def test_questions_without_an_image_are_shorter_than_all_with_one(data: StageData) -> None:
    lengths, has_image = data.lengths(), data.keys.has_image.numpy()
    assert lengths[~has_image].max() < lengths[has_image].min()


@pytest.mark.parametrize("buckets", [True, False])
def test_a_sequence_trains_in_the_order_its_recipe_asks_for(
    buckets: bool, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    class Noting(Order):
        def __init__(self, count: int, global_batch: int, seed: int, task: int, lengths: Any = None) -> None:
            given.append(lengths)
            super().__init__(count, global_batch, seed, task, lengths)

    monkeypatch.setattr(run_data, "Order", Noting)
    recipe = recipe_on(prepared, tmp_path, 1, train__length_buckets=buckets)
    sequence.run_sequence(recipe)
    assert [lengths is not None for lengths in given] == [buckets]


def test_buckets_and_questions_per_image_are_not_for_the_same_run(llava: Path) -> None:
    asked = {"train__length_buckets": True, "method__insertion": "after_image"}
    with pytest.raises(ValidationError, match="questions_per_image 1 or length_buckets false"):
        make_recipe(llava, **asked)
    assert make_recipe(llava, **asked, train__questions_per_image=1).train.length_buckets
