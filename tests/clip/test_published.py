"""The shipped ViT-B/16 recipes are the published settings, number by number (docs/design.md 5.1 to 5.11)."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest

from pipeline.clip.images.datasets import BASE_TO_NEW, CROSS_DATASET_TARGETS
from pipeline.clip.methods import method_class
from pipeline.clip.recipe import AverageConfig, ConsistencyConfig, load_benchmark
from pipeline.clip.recipe_search import OptionsConfig
from pipeline.clip.search.engine import BETAS
from pipeline.clip.templates import PROMPTSRC


class Row(NamedTuple):
    """What a method is published with."""

    method: str
    options: dict[str, Any]
    lr: float | None = None
    batch: int | None = None
    epochs: int | None = None
    average: tuple[float, float] | None = None  # epoch with the largest weight, deviation; with it the regularisers


WORDS = "a photo of a"
COOP = {"length": 4, "words": WORDS}
MPL = {"length": 1, "add": 2, "remove": 1, "depth": 9}
BASE_TO_NEW_ROWS = {
    "zero_shot": Row("zero_shot", {}),
    "coop": Row("coop", COOP, 0.002, 32, 200),
    "cocoop": Row("cocoop", {"length": 4}, 0.002, 1, 10),
    "kgcoop": Row("kgcoop", {"length": 4}, 0.002, 128, 100),
    "maple": Row("maple", {"length": 2, "depth": 9}, 0.0035, 4, 5),
    "mpl": Row("mpl", MPL, 0.0035, 4, 5),
    "ivlp": Row("ivlp", {"length": 4, "length_vision": 4, "depth": 9}, 0.0025, 4, 20),
    "promptsrc": Row("ivlp", {"length": 4, "length_vision": 4, "depth": 9}, 0.0025, 4, 20, (15, 1)),
}
CROSS_ROWS = {
    "zero_shot": Row("zero_shot", {}),
    "coop": Row("coop", COOP, 0.002, 32, 50),
    "cocoop": Row("cocoop", {"length": 4}, 0.002, 1, 10),
    "maple": Row("maple", {"length": 2, "depth": 3}, 0.0026, 4, 2),
    "mpl": Row("mpl", MPL, 0.0035, 4, 2),
    "promptsrc": Row("ivlp", {"length": 4, "length_vision": 4, "depth": 3}, 0.0025, 4, 20, (6, 10)),
}
RECIPES = {"base2new_vitb16": BASE_TO_NEW_ROWS, "cross_vitb16": CROSS_ROWS, "domain_vitb16": CROSS_ROWS}


@pytest.mark.parametrize("name", RECIPES)
def test_methods_are_trained_as_published(name: str) -> None:
    recipe, rows = load_benchmark(name), RECIPES[name]
    assert [method.name for method in recipe.methods] == list(rows)
    for method in recipe.methods:
        row, train = rows[method.name], recipe.train_of(method, "caltech101")
        assert (method.kind, method.options) == (row.method, row.options), method.name
        assert not method.per_class
        assert method.knowledge == 8
        if row.lr is not None:
            assert (train.lr, train.global_batch, train.epochs) == (row.lr, row.batch, row.epochs), method.name
        assert (train.momentum, train.weight_decay, train.warmup_epochs) == (0.9, 5e-4, 1)
        assert (train.clip, train.augment) == (None, "crop_flip")
        regularised = row.average is not None
        assert method.consistency == (ConsistencyConfig(text=25, image=10, logits=1) if regularised else None)
        assert method.average == (
            AverageConfig(mean=row.average[0], deviation=row.average[1]) if row.average is not None else None
        )


RELEASED_SEARCH = {
    "options": OptionsConfig(text=tuple(range(7)), vision=tuple(range(7))),
    "epochs": 80,
    "global_batch": 4,
    "lr": 0.0035,
    "alpha_lr": 0.0035,
    "validation_batch": 16,
}
EVEN_OPTIONS = OptionsConfig(text=(0, 2, 4, 6), vision=(0, 2, 4, 6))
SEARCHES: dict[str, dict[str, Any]] = {
    "dpl": RELEASED_SEARCH,
    "dpl-distilled": RELEASED_SEARCH,
    "dpl-0246": RELEASED_SEARCH | {"options": EVEN_OPTIONS, "epochs": 60},
    "dpl-shuffled": RELEASED_SEARCH,
    "dpl-even": RELEASED_SEARCH,
    "dpl-released": RELEASED_SEARCH | {"validation": "first", "start": "released"},
}


def test_dpl_is_searched_and_trained_as_published() -> None:
    recipe = load_benchmark("dpl_vitb16")
    assert BETAS == (0.5, 0.999)
    rows = {method.name: method for method in recipe.methods}
    assert list(rows) == ["zero_shot", *SEARCHES]
    right = {"validation": "shuffled", "start": "small", "tie": 0}
    for name, settings in SEARCHES.items():
        search, train = recipe.search_of(rows[name]), recipe.train_of(rows[name], "eurosat")
        assert search is not None and rows[name].kind == "dpl"
        assert {field: getattr(search, field) for field in (*settings, *right)} == right | settings, name
        assert (train.lr, train.global_batch, train.epochs, train.warmup_epochs) == (0.0035, 4, 40, 1)
        assert (train.momentum, train.weight_decay, train.clip, train.augment) == (0.9, 5e-4, None, "crop_flip")
    terms = {name: row.consistency for name, row in rows.items() if row.consistency is not None}
    assert terms == {"dpl-distilled": ConsistencyConfig(text=0, image=0, logits=1)}
    assert {name: row.options for name, row in rows.items() if row.options} == {"dpl-released": {"texts": "ensemble"}}
    assert [rows[f"dpl-{how}"].search.lengths for how in ("shuffled", "even")] == ["shuffled", "even"]  # type: ignore[union-attr]


def test_coop_learns_fewer_epochs_on_imagenet() -> None:
    recipe = load_benchmark("base2new_vitb16")
    epochs = {m.name: recipe.train_of(m, "imagenet").epochs for m in recipe.methods}
    assert epochs == {name: 50 if name == "coop" else row.epochs or 5 for name, row in BASE_TO_NEW_ROWS.items()}


PROTOCOLS: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = [
    ("base2new_vitb16", "base_to_new", BASE_TO_NEW, ()),
    ("cross_vitb16", "cross_dataset", ("imagenet",), CROSS_DATASET_TARGETS),
    ("dpl_vitb16", "all_classes", BASE_TO_NEW, ()),
    ("domain_vitb16", "cross_dataset", ("imagenet",), ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")),
]


@pytest.mark.parametrize(("name", "protocol", "datasets", "targets"), PROTOCOLS)
def test_datasets_shots_seeds_and_backbone_are_the_published_ones(
    name: str, protocol: str, datasets: tuple[str, ...], targets: tuple[str, ...]
) -> None:
    recipe = load_benchmark(name)
    assert (recipe.model.path, recipe.seeds) == ("openai/clip-vit-base-patch16", (1, 2, 3))
    assert (recipe.data.protocol, recipe.data.shots, recipe.data.fewer) == (protocol, 16, "refuse")
    assert tuple(entry.name for entry in recipe.data.datasets) == datasets
    assert tuple(entry.name for entry in recipe.data.targets) == targets
    for entry in (*recipe.data.datasets, *recipe.data.targets):
        assert entry.model_fields_set == {"name"}


def test_what_a_recipe_leaves_out_starts_as_published() -> None:
    start = {name: inspect.signature(method_class(name)).parameters for name in ("cocoop", "kgcoop", "maple", "ivlp")}
    assert {name: found["words"].default for name, found in start.items()} == dict.fromkeys(start, WORDS)
    mpl = inspect.signature(method_class("mpl")).parameters
    assert [mpl[option].default for option in ("first", "tied", "template_words")] == ["code", False, False]


def test_promptsrc_averages_sixty_templates() -> None:
    assert len(PROMPTSRC) == len(set(PROMPTSRC)) == 60
    assert all(template.count("{}") == 1 and template.endswith(".") for template in PROMPTSRC)
    assert (PROMPTSRC[0], PROMPTSRC[1], PROMPTSRC[59]) == (
        "a photo of a {}.",
        "a bad photo of a {}.",
        "itap of the {}.",
    )
    assert ConsistencyConfig().templates == PROMPTSRC
