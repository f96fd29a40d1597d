"""Every method has options of its own: what it has not got is refused, and left behind where another is named later."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load_recipe
from pipeline.config.method import ONCE_OF_ALL, of_a_record
from pipeline.config.recipe import Recipe
from pipeline.errors import UserError
from pipeline.methods.modalprompt import ModalPromptOptions
from tests.config.test_config import MINIMAL


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(MINIMAL + "method: {k: 2, gate: 0.1, prompt_length: 4}\n")
    return path


def child(mine: Path, method: str) -> Recipe:
    path = mine.with_name("child.yaml")
    path.write_text(f"extends: mine.yaml\nmethod: {method}\n")
    return load_recipe(path)


@pytest.mark.parametrize(
    "overrides", [["method.name=sequential"], ["method.prompt_length=4", "method.name=sequential"]]
)
def test_a_method_that_is_named_later_leaves_behind_what_it_has_not_got(mine: Path, overrides: list[str]) -> None:
    method = load_recipe(mine, overrides).method
    assert method.model_dump() == {
        "name": "sequential",
        "insertion": "after_bos",
        "prompt_length": 4,
        "init": "vocab_rows",
        "text_only": "insert",
        "part": "input_rows",
    }
    assert child(mine, "{name: sequential}").method == method


@pytest.mark.parametrize("overrides", [["method.name=joint", "method.k=3"], ["method.k=3", "method.name=joint"]])
def test_an_option_beside_the_name_of_a_method_without_it_is_refused(mine: Path, overrides: list[str]) -> None:
    expected = r"method\.k: found 3, the method joint has no option 'k'; it has .*\. It is an option of modalprompt"
    with pytest.raises(UserError, match=expected):
        load_recipe(mine, overrides)
    with pytest.raises(UserError, match=expected):
        child(mine, "{name: joint, k: 3}")


def test_a_misspelt_option_is_not_left_behind(mine: Path) -> None:
    mine.write_text(MINIMAL + "method: {prompt_lenght: 4}\n")
    for overrides in ([], ["method.name=joint"]):
        with pytest.raises(UserError, match=r"no option 'prompt_lenght'.*Did you mean 'prompt_length'\?"):
            load_recipe(mine, overrides)


def test_a_rule_that_a_recipe_chooses_replaces_that_of_the_one_it_extends(mine: Path) -> None:
    mine.write_text(MINIMAL + "method: {selection: {name: soft, temperature: 0.5}}\n")
    method = child(mine, "{selection: {name: topk, k: 4}}").method
    assert isinstance(method, ModalPromptOptions) and method.selection == {"name": "topk", "k": 4}


def test_a_field_of_a_method_in_the_wrong_place_is_found(mine: Path) -> None:
    with pytest.raises(UserError, match=r"unknown field 'image_weight'.*Did you mean 'method\.image_weight'\?"):
        load_recipe(mine, ["image_weight=0.3"])


def test_a_run_from_before_methods_had_options_of_their_own_means_what_it_meant(mine: Path) -> None:
    run = mine.with_name("run")
    run.mkdir()
    before = {
        **yaml.safe_load(MINIMAL),
        "name": "small",
        "method": {"name": "independent", "k": 2, "gate": None, "selection": "oracle", "prompt_length": 3},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(before))
    (run / "run.json").write_text("{}")
    method = load_recipe(run / "config.yaml").method
    assert (method.name, method.model_dump()["prompt_length"]) == ("independent", 3)
    with pytest.raises(UserError, match="no option 'k'"):
        load_recipe(run / "config.yaml", ["method.k=3"])
    assert of_a_record({"name": "zero_shot", **dict.fromkeys(ONCE_OF_ALL, 1)}) == {"name": "zero_shot", "insertion": 1}
    assert of_a_record({"name": "joint", "prompt_lenght": 4}) == {"name": "joint", "prompt_lenght": 4}
