"""A stage with the switches for speed learns what it learns without them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.backbones.compiled import Compiled, counted_compilations
from pipeline.config.recipe import Recipe
from pipeline.data.sample import Sample
from pipeline.data.sample_list import SampleList
from pipeline.ranks.world import init_world
from pipeline.sequence import switches
from pipeline.sequence.engine import lmm_engine
from tests.training.worlds import KEY_WIDTH, make_pool, make_recipe, make_samples, train_once


def learned(recipe: Recipe, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a stage behind two others, of long questions with images and short ones without, and its values."""
    drawn, keys = make_samples(10, text_only=(1, 2, 4, 5, 6, 8))
    samples = SampleList(
        [
            Sample(one.id, one.image, f"{one.question} {'and where is it? ' * 3 if one.image else ''}", one.answer)
            for one in drawn
        ]
    )
    engine = lmm_engine(recipe, init_world(), KEY_WIDTH)
    history, values = train_once(engine, recipe, init_world(), folder, make_pool(2), (samples, keys))
    return [line.loss for line in history], values


@pytest.mark.parametrize("switch", ["packing", "compile"])
def test_a_stage_learns_the_same(
    llava: Path, tmp_path: Path, switch: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def recipe(**changes: Any) -> Recipe:
        return make_recipe(llava, train__deepspeed="ds_configs/zero2.json", train__global_batch=8, **changes)

    expected = learned(recipe(), tmp_path / "plain")
    before = counted_compilations()
    if switch == "packing":
        changed = recipe(train__packing="samples")
    else:
        monkeypatch.setattr(switches, "Compiled", lambda lmm, tower: Compiled(lmm, tower, "aot_eager"))
        changed = recipe(train__compile="decoder")
    with caplog.at_level(logging.INFO):
        found = learned(changed, tmp_path / "switched")
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    torch.testing.assert_close(
        found[1], expected[1], atol=1e-4, rtol=1e-4
    )  # Adam divides small gradients by themselves
    if switch == "packing":
        (line,) = [line for line in caplog.messages if "packed on this rank" in line]
        packed, padded = (float(word) for word in line.replace(",", "").split() if word.startswith("0."))
        assert padded < packed < 1
    else:
        assert counted_compilations() > before
