"""The closed form of a step's operations is what is counted, and holds what the documentation says of larger sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from pipeline.backbones.lmm import DTYPES
from pipeline.bench import measure
from pipeline.bench.operations import SHARED, TASKS, VARIANTS, bench_operations, step_operations
from pipeline.bench.reference import ReferenceStep, Towers
from pipeline.bench.sizes import SIZES, every_image, make_batch, make_lmm
from pipeline.bench.step import OurStep, PeftStep, with_kept_features
from pipeline.data.collate import Batch

SAMPLES = 5  # not a multiple of the questions per image


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_closed_form_is_what_is_counted(variant: str) -> None:
    size = SIZES["tiny"]
    lmm = make_lmm(size)
    sets = torch.randn(TASKS, size.prompt_length, size.width, generator=torch.Generator().manual_seed(1))
    batch = make_batch(size, SAMPLES, SHARED if variant.endswith("shared") else 1, TASKS - 1)
    step: Callable[[Batch], Any]
    if variant == "reference":
        step, batch = (
            ReferenceStep(lmm, size, sets[:-1], sets[-1], Towers(size, "cpu", DTYPES["float32"])),
            every_image(batch),
        )
    elif variant == "peft":
        pytest.importorskip("peft")
        step, batch = PeftStep(lmm, size), every_image(batch)
    else:
        step = OurStep(lmm, size, sets[:-1], sets[-1], "after_image" if "image" in variant else "after_bos")
        batch = with_kept_features(lmm, batch) if variant.endswith("kept") else batch
    counted = measure.operations(partial(step, batch))[0]
    assert step_operations(size, SAMPLES, variant) == counted


def test_recomputing_is_what_the_reference_could_leave_out() -> None:
    size = SIZES["7b"]
    assert step_operations(size, 4, "reference", recomputed=False) < 0.72 * step_operations(size, 4, "reference")


def test_the_ratios_of_the_documentation_hold_at_the_size_of_llava() -> None:
    ratios = bench_operations()["ratios"]
    assert ratios["reference"]["small"] == pytest.approx(
        {"after_bos": 2.09, "after_bos_kept": 2.13, "after_image": 4.06, "after_image_shared": 9.44}, abs=0.02
    )
    assert ratios["reference"]["7b"] == pytest.approx(
        {"after_bos": 1.54, "after_bos_kept": 1.57, "after_image": 2.75, "after_image_shared": 6.80}, abs=0.02
    )
    assert ratios["peft"]["7b"]["after_bos"] == pytest.approx(1.04, abs=0.01)
