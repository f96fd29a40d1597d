"""What a benchmark reports: class names beside counts, and the mean over the targets of a cross-dataset run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_prep.benchmark import prepare_benchmark
from pipeline.clip.benchmark import unit_evaluator
from pipeline.clip.benchmark.evaluate import evaluate_group
from pipeline.clip.benchmark.report import write_benchmark_report
from pipeline.clip.benchmark.results import UnitResult, results_json, results_table
from pipeline.clip.benchmark.run import run_benchmark
from pipeline.clip.benchmark.scores import Counts
from pipeline.clip.recipe import ClipRecipe
from tests.clip.project import NAMES, fields, make_project, recipe, save_dataset

OTHERS = {"figs": ("fig", "nut"), "pens": ("pen", "ink", "nib")}


def unit(seed: int, method: str = "mpl", **right: int) -> UnitResult:
    """A result on the source "toys" and on targets, of one class with ten images each."""
    groups = {name: Counts((count,), (10,)) for name, count in right.items()}
    return UnitResult(method, "toys", seed, groups, {name: ("thing",) for name in groups})


def test_the_mean_over_targets_leaves_out_the_source_and_spreads_over_seeds() -> None:
    found = [unit(1, toys=10, figs=2, pens=4), unit(2, toys=10, figs=6, pens=8)]
    assert [result.target_mean for result in found] == pytest.approx([30.0, 70.0])
    content = results_json("cross_dataset", found)
    assert [row["target_mean"] for row in content["units"]] == pytest.approx([30.0, 70.0])
    (line,) = content["lines"]
    assert line["target_mean"] == pytest.approx({"mean": 50.0, "deviation": 28.2843, "seeds": 2}, abs=1e-3)
    assert content["averages"]["mpl"]["target_mean"] == pytest.approx(50.0)
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(results_table("run", content))
    text = console.export_text()
    assert "target mean" in text and "50.00 ± 28.28" in text


def test_halves_have_no_targets() -> None:
    result = UnitResult(
        "mpl", "toys", 1, {half: Counts((1,), (2,)) for half in ("base", "new")}, {"base": (), "new": ()}
    )
    content = results_json("base_to_new", [result])
    assert content["units"][0]["target_mean"] is None
    assert content["lines"][0]["target_mean"] is None
    assert "target_mean" not in content["averages"]["mpl"]


def test_a_result_is_read_back_with_the_names_of_its_classes() -> None:
    result = unit(1, toys=3)
    found = json.loads(json.dumps(result.to_json()))
    assert found["groups"]["toys"]["names"] == ["thing"]
    assert UnitResult.from_json(found) == result


@pytest.fixture
def crossed(tmp_path: Path) -> ClipRecipe:
    """Zero-shot with the datasets' templates and with one of its own, on a source and two targets."""
    folder = make_project(tmp_path)
    for name, names in OTHERS.items():
        save_dataset(folder / "data", name, names)
    targets = [
        {
            "name": name,
            "layout": "split_zhou",
            "images": "images",
            "split": f"split_zhou_{name}.json",
            "template": f"the {name} {{}}.",
        }
        for name in OTHERS
    ]
    data: dict[str, Any] = {"protocol": "cross_dataset", "targets": targets}
    assert "template" not in fields(folder)["data"]["datasets"][0]
    own = {"name": "own", "method": "zero_shot", "options": {"template": "my {}."}}
    return recipe(folder, "zero_shot", own, data=data)


def test_a_cross_dataset_run_says_names_and_target_mean(crossed: ClipRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def spy(module: Any, images: Any, group: Any) -> Counts:
        asked.append(module.learner.template)
        return evaluate_group(module, images, group)

    monkeypatch.setattr(unit_evaluator, "evaluate_group", spy)
    prepare_benchmark(crossed, progress=False)
    result = run_benchmark(crossed)
    assert asked == ["a photo of a {}.", "the figs {}.", "the pens {}.", *["my {}."] * 3]
    found = result["units"][0]
    names = {group: list(counts["names"]) for group, counts in found["groups"].items()}
    assert names == {"toys": list(NAMES)} | {name: list(classes) for name, classes in OTHERS.items()}
    expected = sum(found["groups"][name]["accuracy"] for name in OTHERS) / 2
    assert found["target_mean"] == pytest.approx(expected)
    page = write_benchmark_report(crossed.run_path).read_text()
    assert page.count("<th>target mean</th>") == 2
    assert page.count(f"<td>{expected:.2f}</td>") >= 2
    assert all(name in page for classes in OTHERS.values() for name in classes)
