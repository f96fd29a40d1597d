"""The runs of a comparison: recipes equal but for what is the method's, and sentences for what cannot be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config.compared import Comparison, load_comparison
from pipeline.config.load import load_recipe
from pipeline.config.yaml_file import find_recipe, read_recipe, recipe_names
from pipeline.errors import UserError


def compared(*methods: str, overrides: tuple[str, ...] = (), seeds: tuple[int, ...] = ()) -> Comparison:
    return load_comparison("nano", overrides, methods, seeds)


def recipe_file(folder: Path, comparison: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "nano", "comparison": comparison}))
    return str(path)


def test_every_method_gets_every_seed_and_else_the_recipe() -> None:
    found = compared("modalprompt", "sequential", seeds=(0, 2))
    assert [run.title for run in found.runs] == ["modalprompt-s0", "sequential-s0", "modalprompt-s2", "sequential-s2"]
    assert [str(run.recipe.run_path) for run in found.runs[:2]] == [
        "runs/nano-modalprompt-s0",
        "runs/nano-sequential-s0",
    ]
    plain = load_recipe("nano")
    for run in found.runs:
        assert run.recipe.train == plain.train and run.recipe.data == plain.data and run.recipe.name == "nano"
    assert found.runs[0].recipe.method == plain.method
    assert [run.recipe.evaluate.zero_shot for run in found.runs] == [True, False, False, False]


def test_a_method_has_options_and_rates_of_its_own_by_set() -> None:
    found = compared("modalprompt", "task_lora", overrides=("task_lora.rank=4", "task_lora.train.lr_prompt=0.002"))
    ours, lora = (run.recipe for run in found.runs)
    assert (lora.method.rank, lora.train.lr_prompt) == (4, 0.002)  # type: ignore[attr-defined]
    assert ours.train.lr_prompt == load_recipe("nano").train.lr_prompt


def test_a_method_is_compared_with_itself_under_another_name(tmp_path: Path) -> None:
    methods = ["modalprompt", {"name": "always_two", "method": "modalprompt", "options": {"gate": None, "k": 2}}]
    found = load_comparison(recipe_file(tmp_path, {"methods": methods, "seeds": [1]}))
    other = found.runs[1].recipe
    assert found.labels == ["modalprompt", "always_two"] and found.seeds == [1]
    assert (other.method.k, other.name) == (2, "mine-always_two")  # type: ignore[attr-defined]
    assert other.run_path != found.runs[0].recipe.run_path
    assert other.data.prepared == found.runs[0].recipe.data.prepared
    assert load_comparison(recipe_file(tmp_path, {"methods": methods}), (), ["always_two"]).labels == ["always_two"]


def test_layers_of_low_rank_updates_are_the_comparisons(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, {"methods": ["task_lora"], "targets": ["q_proj"]})
    assert load_comparison(path).runs[0].recipe.method.targets == ("q_proj",)  # type: ignore[attr-defined]
    other = {"name": "other", "method": "task_lora", "options": {"targets": ["v_proj"]}}
    with pytest.raises(UserError, match=r"different layers \(task_lora: .*; other: v_proj\).*comparison\.targets"):
        load_comparison(recipe_file(tmp_path, {"methods": ["task_lora", other]}))


@pytest.mark.parametrize(
    ("methods", "overrides", "said"),
    [
        (("modalpromt",), (), r"no method 'modalpromt'.*Did you mean 'modalprompt'"),
        (("task_lora",), ("task_lora.rnk=4",), r"method task_lora has no option 'rnk'.*rank"),
        (("task_lora",), ("task_lora.train.steps=4",), r"'steps' is the recipe's, equal for all methods"),
        (("task_lora", "task_lora"), (), r"every compared method once, and task_lora"),
        (("modalprompt",), ("run_dir=runs/x",), None),
        (("modalprompt", "joint"), ("run_dir=runs/x",), r"would both be in runs/x; put \{method\} and \{seed\}"),
    ],
)
def test_what_cannot_be_compared_is_said(
    methods: tuple[str, ...], overrides: tuple[str, ...], said: str | None
) -> None:
    if said is None:
        compared(*methods, overrides=overrides)
        return
    with pytest.raises(UserError, match=said):
        compared(*methods, overrides=overrides)


def test_all_faults_are_said_at_once() -> None:
    with pytest.raises(UserError, match=r"'nothing'.*'neither'"):
        compared("nothing", "neither")


def test_without_methods_it_is_said_how_to_name_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--methods a,b"):
        load_comparison(recipe_file(tmp_path, {"methods": []}))


def test_a_benchmark_on_clip_is_not_compared() -> None:
    with pytest.raises(UserError, match="compares its methods by itself"):
        load_comparison("base2new_nano")


def test_a_run_does_not_keep_the_comparison(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tmp_path, {"methods": ["joint"]}))
    recipe.dump_yaml(tmp_path / "config.yaml")
    assert "comparison" not in yaml.safe_load((tmp_path / "config.yaml").read_text())


def test_shipped_comparisons_load() -> None:
    shipped = [name for name in recipe_names() if "comparison" in read_recipe(find_recipe(name))]
    for name in shipped:
        assert load_comparison(name).runs, name
