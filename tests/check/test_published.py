"""The recipes of CoIN and UCIT with published settings are checked without the model being here."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from pipeline.cli.commands import app
from pipeline.config import registry
from pipeline.config.load import load_recipe
from pipeline.config.yaml_file import find_recipe, recipe_names
from pipeline.errors import EXIT_USER

BASES = ("coin_llava15_7b", "ucit_llava15_7b")
PUBLISHED = [name for name in recipe_names() if name.startswith(BASES) and name not in (*BASES, f"{BASES[0]}_compat")]
# Those that have no stages or are references on any part, and ModalPrompt, whose recipes are the bases.
WITHOUT = {"zero_shot", "joint", "independent", "sequential", "modalprompt", "lora_merged"}


def test_every_published_method_has_one_for_each_benchmark() -> None:
    methods = set(registry.BUILT_IN["methods"]) - WITHOUT
    assert set(PUBLISHED) == {f"{base}_{method}" for base in BASES for method in methods}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_names_its_method_and_the_source_of_its_settings(name: str) -> None:
    recipe, head = load_recipe(name), find_recipe(name).read_text("utf-8").partition("extends:")[0]
    assert name.endswith(f"_{recipe.method.name}")
    assert any(
        said in head.replace("\n# ", " ") for said in ("github.com/", "arXiv", "MCITlib", "ours", "No settings of it")
    )
    assert [task.name for task in recipe.data.tasks] == [task.name for task in load_recipe(name[:15]).data.tasks]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name.endswith("olora") else pytest.mark.slow) for name in PUBLISHED]
)
@pytest.mark.usefixtures("empty_machine")
def test_a_recipe_lacks_only_model_clip_and_data(name: str) -> None:
    ranks = 4 if name.startswith("ucit") else 8  # of the published scripts
    done = CliRunner().invoke(app, ["check", name, "--ranks", str(ranks), "--json"])
    assert done.exit_code == EXIT_USER and "Traceback" not in done.stderr + done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["problems"].keys() == {"model", "keys", "data"}, found["problems"]
    assert found["memory"]["ranks"] == ranks, "planned by the sizes that the project knows"


@pytest.mark.usefixtures("empty_machine")
def test_a_budget_is_applied_by_the_sizes_that_the_project_knows() -> None:
    # A unit of rank on the attention of LLaVA-1.5-7B has 1,048,576 values, one row of a prompt set 4,096.
    for method, budget, said in (
        ("task_lora", 3_000_000, "2,097,152 of 3,000,000 values"),
        ("independent", 41_000, "40,960 of 41,000 values"),
    ):
        sets = [part for text in (f"method.name={method}", f"train.budget={budget}") for part in ("--set", text)]
        done = CliRunner().invoke(app, ["check", "coin_llava15_7b", "--ranks", "8", "--json", *sets])
        assert said in json.loads(done.stdout.splitlines()[-1])["budget"]
    sets = ["--set", "method.name=task_lora", "--set", "train.budget=1000"]
    done = CliRunner().invoke(app, ["check", "coin_llava15_7b", "--ranks", "8", "--json", *sets])
    assert done.exit_code == EXIT_USER
    assert "found 1,000 trained values" in json.loads(done.stdout.splitlines()[-1])["problems"]["budget"][0]
