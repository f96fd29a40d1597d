"""The pages of reference name every metric, file, tensor, exit code and public name that the sources have."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel

import pipeline
from pipeline import errors
from pipeline.adapter import meta as adapter_files
from pipeline.adapter.fitted_routing import FITTED
from pipeline.cli.commands import app
from pipeline.clip.benchmark import results
from pipeline.config.load import load_recipe
from pipeline.config.recipe import Recipe
from pipeline.config.yaml_file import recipe_names
from pipeline.data import checksums, shards
from pipeline.data.key_file import IDENTITY_FIELDS, KEYS_FILE
from pipeline.methods import make_method
from pipeline.metrics.continual import METRICS
from pipeline.metrics.scoring import metric_names
from pipeline.prompts.pool import PromptPool
from pipeline.report.compared import COLUMNS
from pipeline.report.tables import METRIC_TEXTS, comparison_header
from pipeline.runs import layout
from pipeline.runs.contents import MatrixFile, PredictionLine, Routing
from pipeline.sequence.costs import Costs
from tests.processes import PROJECT

OF_CLIP = ["groups", "harmonic", "harmonic_of_seeds", "target_mean", "area", "paid", "classes_without"]


def page(name: str) -> str:
    return (PROJECT / "docs" / f"{name}.md").read_text("utf-8")


def named(name: str) -> set[str]:
    """What the tables of a page have in backticks, names of several in one cell apart."""
    rows = [line for line in page(name).splitlines() if line.startswith("|")]
    return {word for row in rows for span in re.findall(r"`([^`]+)`", row) for word in (span, Path(span).name)}


def yaml_of(name: str) -> str:
    return re.findall(r"```yaml\n(.*?)```", page(name), re.DOTALL)[0]


# ---------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(metric_names(), id="of answers"),
        pytest.param([*METRICS, *METRIC_TEXTS, "retention_per_task", "routing_loss_per_task"], id="of sequences"),
        pytest.param([*Routing.model_fields, "confused"], id="of routing"),
        pytest.param(OF_CLIP, id="of CLIP"),
    ],
)
def test_every_metric_is_defined(names: list[str]) -> None:
    assert names and not set(names) - named("metrics")


def test_every_cost_is_defined() -> None:
    names = Costs().content(PromptPool(), make_method(load_recipe("nano").method), 1)
    assert len(names) >= 5 and not set(names) - named("metrics")


def test_the_numbers_of_a_benchmark_are_those_that_it_writes() -> None:
    source = inspect.getsource(results)
    assert not [name for name in OF_CLIP if f'"{name}"' not in source]


def test_every_column_of_report_and_compare_is_explained() -> None:
    table = page("metrics").partition("## `report` and `compare`")[2].partition("\n## ")[0]
    titles = [column.title for column in COLUMNS] + comparison_header([])
    assert not [title for title in titles if not re.search(rf"^\|[^|]*\b{re.escape(title)}\b", table, re.MULTILINE)]


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "file",
    [
        layout.CONFIG, layout.STATE, layout.LOCK, layout.LENGTHS_FILE, layout.MATRIX, layout.RESULTS, layout.REPORT,
        layout.METRICS, layout.TENSORS, layout.META, layout.COMPLETE, layout.ASK, adapter_files.META,
        adapter_files.PROJECTOR, adapter_files.CARD, FITTED, KEYS_FILE, shards.DATASET_FILE, shards.INDEX_FILE,
        shards.KEYS_TABLE, checksums.CHECKSUMS_FILE,
    ],
)  # fmt: skip
def test_a_file_that_is_written_is_described(file: str) -> None:
    assert file in named("files")


def fields(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(fields(MatrixFile), id="matrix.json"),
        pytest.param(fields(PredictionLine), id="predictions"),
        pytest.param(fields(adapter_files.Meta), id="adapter.json"),
        pytest.param([*shards.INDEX_SCHEMA.names, *IDENTITY_FIELDS], id="index.parquet"),
    ],
)
def test_a_field_that_is_read_is_described(names: list[str]) -> None:
    assert not set(names) - named("files")


def test_the_format_of_adapters_is_the_current_one() -> None:
    older = [version for version in adapter_files.READ_VERSIONS if version != adapter_files.FORMAT_VERSION]
    assert f"| `format` | {adapter_files.FORMAT_VERSION}; {older[0]} is read too," in page("files")


def test_the_record_of_a_shard_is_one() -> None:
    from pipeline.data.sample import Sample

    (record,) = re.findall(r"```json\n(.*?)```", page("files"), re.DOTALL)
    assert Sample.from_json(record.encode(), None).answer == "bread"


# ---------------------------------------------------------------------------------------------- codes, names, recipe


def test_every_verb_has_its_row_and_no_other() -> None:
    table = page("running").partition("## Verbs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    verbs = [verb for row in rows for verb in re.findall(r"`([\w-]+)`", row)]
    group: Any = typer.main.get_command(app)
    assert sorted(verbs) == sorted(group.commands)


def test_every_shipped_recipe_is_named_or_is_one_of_a_family() -> None:
    table = page("running").partition("## Shipped recipes")[2].partition("\n## ")[0]
    there = set(re.findall(r"`(\w+)`", table))
    family = re.compile(r"(coin|ucit)_llava15_7b_\w+|\w+_coin3")  # "and so on" of the table
    assert not [name for name in recipe_names() if name not in there and not family.fullmatch(name)]


def test_the_tasks_that_the_coin_tutorial_fetches_are_those_of_the_recipe_that_it_runs() -> None:
    text = page("tutorial_coin")
    (fetched,) = re.findall(r"^python -m data_prep download coin --tasks (\S+) --list$", text, re.MULTILINE)
    (run,) = re.findall(r"^python -m pipeline run (\w+_coin3)$", text, re.MULTILINE)
    recipe = load_recipe(run)
    assert isinstance(recipe, Recipe) and fetched.split(",") == [task.name for task in recipe.data.tasks]


def test_the_exit_codes_are_those_of_the_sources() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page("exit_codes"), re.MULTILINE)}
    assert codes == {getattr(errors, name) for name in dir(errors) if name.startswith("EXIT_")}


def test_the_public_names_are_those_of_the_package() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", page("python_api").partition("## ")[0], re.MULTILINE)
    assert sorted(rows) == sorted(pipeline._PLACES)


def test_the_annotated_recipe_is_a_recipe_whose_fields_all_have_a_reason(tmp_path: Path) -> None:
    text = yaml_of("annotated_recipe")
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert isinstance(recipe, Recipe) and [task.name for task in recipe.data.tasks] == ["Mine", "Second"]
    written: dict[str, Any] = yaml.safe_load(text)
    assert set(written) >= {"data", "model", "keys", "method", "train", "evaluate", "tracking"}
    assert sum(line.lstrip().startswith("#") for line in text.splitlines()) >= 25


def test_an_unknown_metric_would_be_missed() -> None:
    assert "no_such_metric" not in named("metrics") and "no_such_file.json" not in named("files")
