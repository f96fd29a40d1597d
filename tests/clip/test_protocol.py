"""Datasets, steps, rates and scores of the benchmark."""

from __future__ import annotations

import pytest

from pipeline.clip.benchmark.scores import average, base_to_new, count, harmonic_mean
from pipeline.clip.images.datasets import BASE_TO_NEW, CROSS_DATASET_TARGETS, DATASETS, DOMAIN_TARGETS, dataset
from pipeline.clip.learning.protocol import epoch_rates, small_set_warning, steps_per_epoch
from pipeline.errors import UserError


def test_eleven_datasets_and_four_variants_of_imagenet() -> None:
    assert len(BASE_TO_NEW) == 11
    assert len(CROSS_DATASET_TARGETS) == 10
    assert DOMAIN_TARGETS == ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")


# docs/design.md 5.11.
HALVES = {
    "imagenet": (500, 500),
    "caltech101": (50, 50),
    "oxford_pets": (19, 18),
    "stanford_cars": (98, 98),
    "oxford_flowers": (51, 51),
    "food101": (51, 50),
    "fgvc_aircraft": (50, 50),
    "sun397": (199, 198),
    "dtd": (24, 23),
    "eurosat": (5, 5),
    "ucf101": (51, 50),
}


def test_base_and_new_classes_are_as_many_as_published() -> None:
    assert {name: (DATASETS[name].base, DATASETS[name].new) for name in BASE_TO_NEW} == HALVES


# docs/design.md 5.5: steps of 5 epochs of 16 shots on the base half, batch 4.
STEPS = {
    "imagenet": 2000,
    "sun397": 796,
    "stanford_cars": 392,
    "oxford_flowers": 204,
    "food101": 204,
    "ucf101": 204,
    "caltech101": 200,
    "fgvc_aircraft": 200,
    "dtd": 96,
    "oxford_pets": 76,
    "eurosat": 20,
}


def test_steps_are_as_many_as_published() -> None:
    assert {name: steps_per_epoch(16 * DATASETS[name].base, 4) for name in STEPS} == STEPS


def test_every_template_takes_one_name_and_every_instruction_says_where() -> None:
    for description in DATASETS.values():
        assert description.template.count("{}") == 1
        assert f"/data/{description.folder}" in description.instructions("/data")


def test_an_unknown_dataset_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no dataset 'caltech_101'.*Did you mean 'caltech101'"):
        dataset("caltech_101")


def test_learning_rates_per_epoch_are_the_published_ones() -> None:
    assert epoch_rates(0.0035, 5) == pytest.approx([1e-5, 0.0035, 0.003166, 0.002291, 0.001209], abs=1e-6)
    assert epoch_rates(0.0035, 2) == pytest.approx([1e-5, 0.0035])
    assert epoch_rates(0.002, 1) == [1e-5]
    assert epoch_rates(0.002, 4, warmup_epochs=0)[0] == 0.002


def test_a_batch_larger_than_the_set_is_one_step_and_said() -> None:
    assert steps_per_epoch(80, 128) == 1
    assert steps_per_epoch(83, 4) == 20
    warning = small_set_warning(80, 128, 100)
    assert warning is not None and "80 training images" in warning and "100 steps" in warning
    assert small_set_warning(128, 128, 100) is None


def test_accuracy_counts_images_and_classes() -> None:
    counts = count([0, 1, 1, 0], [0, 1, 0, 0], classes=3)
    assert counts.accuracy == 0.75
    assert counts.per_class() == [2 / 3, 1.0, None]


def test_harmonic_means_both_ways() -> None:
    # CLIP's rows of Caltech101 and EuroSAT (as CoCoOp's paper prints them).
    rows = {"caltech101": base_to_new([(0.9684, 0.94)]), "eurosat": base_to_new([(0.5648, 0.6405)])}
    result = average(rows)
    assert result.harmonic_of_means == pytest.approx(harmonic_mean(result.base, result.new))
    assert result.mean_of_harmonics == pytest.approx((0.95399 + 0.60027) / 2, abs=1e-4)
    assert result.harmonic_of_means != pytest.approx(result.mean_of_harmonics, abs=1e-4)


def test_seeds_spread_with_the_sample_deviation() -> None:
    result = base_to_new([(0.8, 0.6), (0.9, 0.7), (1.0, 0.8)])
    assert (result.base.mean, result.base.deviation) == pytest.approx((0.9, 0.1))
    assert result.base.seeds == 3
    assert result.harmonic == pytest.approx(harmonic_mean(0.9, 0.7))
    assert base_to_new([(0.8, 0.6)]).base.deviation is None
    assert harmonic_mean(0.0, 0.0) == 0.0
