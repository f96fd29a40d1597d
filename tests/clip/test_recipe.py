"""Benchmark recipes: what they resolve to, and one sentence for what is wrong in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.clip.images.datasets import BASE_TO_NEW, CROSS_DATASET_TARGETS, DATASETS, Dataset
from pipeline.clip.learning.unit import units_of
from pipeline.clip.recipe import clip_recipe, load_benchmark
from pipeline.config.kinds import recipe_kind
from pipeline.config.load import load_recipe
from pipeline.config.yaml_file import recipe_names
from pipeline.errors import UserError
from tests.clip.project import fields

SHIPPED = [name for name in recipe_names() if recipe_kind(name) == "clip"]


def sentence(**changes: Any) -> str:
    methods = changes.pop("methods", ["coop"])
    with pytest.raises(UserError) as error:
        clip_recipe(fields(Path(), *methods, **changes), "tiny")
    return str(error.value)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("mlp", "no method 'mlp'; expected one of zero_shot.*Did you mean 'mpl'"),
        ({"name": "maple", "options": {"dept": 3}}, "maple has no option 'dept'.*Did you mean 'depth'"),
        ({"name": "coop", "options": {"classes": 3}}, "coop has no option 'classes'"),
        ({"name": "mpl", "options": {"first": "Figure"}}, "first: found 'Figure', .*Did you mean 'figure'"),
        ({"name": "coop", "options": {"position": "left"}}, "position: found 'left', expected one of end, middle, fr"),
        ({"name": "coop", "options": {"length": "four"}}, "length: found 'four', expected a whole number"),
        ({"name": "vpt", "options": {"template": "a photo"}}, "needs {} where the class name goes"),
        ({"name": "maple", "per_class": True}, "per_class belongs to coop"),
        ({"name": "coop", "per_class": True}, "learns a context for each class.*set data.protocol to all_classes"),
        ({"name": "coop", "train": {"epoch": 3}}, "has no field 'epoch'.*Did you mean 'epochs'"),
        ({"name": "coop", "train": {"lr": -1}}, r"methods.coop.train: lr: found -1, expected a number greater than 0"),
        ({"name": "coop", "train": {"processes": 4}}, "has no field 'processes'"),
        ({"name": "zero_shot", "average": {}}, "learns nothing"),
    ],
)
def test_a_wrong_method_is_named(method: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        clip_recipe(fields(Path(), method), "tiny")


def test_what_else_is_wrong_is_said() -> None:
    assert "coop stands there more often" in sentence(methods=["coop", "coop"])
    assert "expected every seed once" in sentence(seeds=[1, 1])
    assert "Did you mean 'caltech101'" in sentence(data={"datasets": ["caltech_101"]})
    assert "needs the name of its file in split" in sentence(data={"datasets": [{"name": "a", "layout": "csv"}]})
    assert "needs {} where the class name goes" in sentence(data={"datasets": [{"name": "dtd", "template": "texture"}]})
    assert "targets belong to the protocol cross_dataset" in sentence(data={"protocol": "cross_dataset"})
    assert "targets belong to the protocol cross_dataset" in sentence(data={"targets": ["dtd"]})
    assert "only {name} is filled in" in sentence(run_dir="runs/{seed}")
    assert "unknown field 'sede'" in sentence(sede=1)


def described(**entry: Any) -> Dataset:
    return clip_recipe(fields(Path(), "coop", data={"datasets": [entry]}), "tiny").data.datasets[0].description


def test_a_published_dataset_is_read_from_where_the_recipe_says() -> None:
    published = DATASETS["eurosat"]
    assert described(name="eurosat") == published
    moved = described(name="eurosat", folder="my/eurosat", images="pictures", split="mine.json")
    assert (moved.folder, moved.images, moved.split) == ("my/eurosat", "pictures", "mine.json")
    assert (moved.template, moved.layout, moved.classes) == (published.template, published.layout, 10)
    assert described(name="dtd", template="{} here.").folder == DATASETS["dtd"].folder
    assert "fgvc_aircraft' of layout aircraft has no split file, and split is 'mine.json'" in sentence(
        data={"datasets": [{"name": "fgvc_aircraft", "split": "mine.json"}]}
    )


def test_a_published_dataset_in_another_layout_keeps_its_template() -> None:
    pets = described(name="oxford_pets", layout="class_folders", folder="pets")
    assert (pets.template, pets.folder, pets.images) == ("a photo of a {}, a type of pet.", "pets", ".")
    assert described(name="oxford_pets", layout="class_folders", template="{}!").template == "{}!"
    mine = described(name="mine", layout="class_folders")
    assert (mine.template, mine.folder) == ("a photo of a {}.", "mine")


def test_a_resolved_recipe_is_the_same_when_it_is_read_again(tmp_path: Path) -> None:
    recipe = clip_recipe(fields(Path(), "coop", data={"datasets": ["eurosat"]}), "tiny")
    recipe.dump_yaml(tmp_path / "config.yaml")
    assert load_benchmark(str(tmp_path / "config.yaml")) == recipe
    assert load_benchmark(str(tmp_path / "config.yaml")).data.datasets[0].description == DATASETS["eurosat"]


def test_a_method_trains_as_the_recipe_says_but_for_its_own_fields() -> None:
    recipe = clip_recipe(fields(Path(), {"name": "coop", "train": {"lr": 0.002}}, "maple"), "tiny")
    first, second = (recipe.train_of(method) for method in recipe.methods)
    assert (first.lr, second.lr, first.epochs) == (0.002, 0.01, 2)


def test_a_sequence_recipe_has_no_kind_and_is_not_taken_for_a_benchmark() -> None:
    assert recipe_kind("nano") is None
    with pytest.raises(UserError, match="is a benchmark of prompt methods on CLIP; expected a task sequence"):
        load_recipe("base2new_nano")


def test_what_learns_nothing_is_one_unit_for_all_seeds() -> None:
    recipe = clip_recipe(fields(Path(), "zero_shot", "coop", seeds=[1, 2, 3]), "tiny")
    assert [unit.label for unit in units_of(recipe)] == [
        "zero_shot-toys-s1",
        "coop-toys-s1",
        "coop-toys-s2",
        "coop-toys-s3",
    ]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_benchmarks_are_complete(name: str) -> None:
    recipe = load_benchmark(name)
    assert recipe.name == name
    assert units_of(recipe)


def test_the_published_protocols_are_shipped() -> None:
    assert {"base2new_nano", "base2new_vitb16", "cross_vitb16"} <= set(SHIPPED)
    recipe = load_benchmark("base2new_vitb16")
    assert tuple(entry.name for entry in recipe.data.datasets) == BASE_TO_NEW
    recipe = load_benchmark("cross_vitb16")
    assert [entry.name for entry in recipe.data.datasets] == ["imagenet"]
    assert tuple(entry.name for entry in recipe.data.targets) == CROSS_DATASET_TARGETS
