"""A comparison's rows, tables and page are those of its runs' files, and runs of earlier versions are compared too."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.report.compared import ComparedMethod, headline, markdown, spread, whole
from pipeline.report.compared_page import stored_figure, write_comparison
from pipeline.runs.folder import RunFolder, read_run

COSTS = {"trained_per_stage": 1712, "stored_per_task": 144.0, "operations_training": 7e6, "operations_answering": 3e6}


def run(folder: Path, seed: int, last: tuple[float, float], **matrix: Any) -> RunFolder:
    """A finished run of two tasks."""
    folder.mkdir(parents=True)
    state = matrix.pop("state", {})
    content = {"tasks": ["A", "B"], "accuracy": [[90.0, None], list(last)], **matrix}
    (folder / "matrix.json").write_text(json.dumps(content))
    (folder / "run.json").write_text(
        json.dumps({"method": folder.name, "stages": ["A", "B"], "status": "done", **state})
    )
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"seed": seed, "data": {"tasks": [{"name": "A"}, {"name": "B"}]}})
    )
    return read_run(folder)


def routed(folder: Path) -> ComparedMethod:
    """A method that routes, with two seeds."""
    facts = {
        "majority": [10.0, 20.0],
        "told": [None, [80.0, 60.0]],
        "routing": {"accuracy": [100.0, 50.0]},
        "format_free": {"accuracy": [[95.0, None], [85.0, 75.0]], "zero_shot": None},
        "costs": COSTS,
        "state": {"changes_earlier": "nothing", "needs_task": False, "routes": True, "timing": {"evaluate_s": 12.5}},
    }
    return ComparedMethod("ours", [run(folder / f"ours-{n}", n, (70.0, 50.0 + 10 * n), **facts) for n in (0, 1)])


def test_means_and_deviations_are_over_the_seeds(tmp_path: Path) -> None:
    ours = routed(tmp_path)
    found = headline([ours])
    assert found == {
        "tasks": ["A", "B"],
        "majority": [10.0, 20.0],
        "methods": {
            "ours": {
                "last": 62.5,
                "told": [80.0, 60.0],
                "routed": [70.0, 55.0],
                "forgetting": 20.0,
                "stored_per_task": 144.0,
            }
        },
    }
    rest = whole([ours])["methods"]["ours"]
    assert rest["deviation"]["last"] == pytest.approx(3.5355, abs=1e-4) and rest["seeds"] == ["0", "1"]
    assert rest["mean"]["format-free"] == 80.0 and rest["mean"]["routed right"] == 75.0
    assert rest["mean"]["GFLOP train"] == pytest.approx(0.007) and rest["mean"]["evaluate s"] == 12.5


def test_a_method_that_has_to_be_told_has_no_routed_scores(tmp_path: Path) -> None:
    state = {"needs_task": True, "routes": False}
    told = ComparedMethod("told", [run(tmp_path / "told", 0, (70.0, 50.0), state=state)])
    assert (told.told(), told.routed()) == ([70.0, 50.0], None)


def test_a_method_that_does_not_route_scores_the_same_told(tmp_path: Path) -> None:
    plain = ComparedMethod("one", [run(tmp_path / "one", 0, (70.0, 50.0), state={"routes": False})])
    assert plain.told() == plain.routed() == [70.0, 50.0]


def test_a_run_of_an_earlier_version_has_gaps_and_a_row(tmp_path: Path) -> None:
    old = ComparedMethod("old", [run(tmp_path / "old", 0, (70.0, 50.0), routing={"accuracy": [100.0, 100.0]})])
    numbers = whole([old])["methods"]["old"]
    assert numbers["last"] == 60.0 and numbers["told"] is None and numbers["stored_per_task"] is None
    assert numbers["format_free"] is None and numbers["mean"]["format-free"] is None
    assert "| old | – | 60.0 |" in markdown([old], "0")


def test_a_number_that_one_seed_lacks_has_no_mean() -> None:
    assert spread([1.0, None]) is None and spread([]) is None
    assert spread([1.0]) == (1.0, None) and spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))


def test_the_page_and_the_tables_have_every_method_and_what_is_missing(tmp_path: Path) -> None:
    old = ComparedMethod("old", [run(tmp_path / "old", 0, (70.0, 50.0))])
    out = tmp_path / "out"
    page = write_comparison(out, "mine", [routed(tmp_path), old], {"budget": "960 <values>"}, ["lora-s1: it ended"])
    text = page.read_text("utf-8")
    for said in (
        "mine: methods compared",
        "62.5 ± 3.5",
        "960 &lt;values&gt;",
        "lora-s1: it ended",
        "<svg",
        "majority answer",
    ):
        assert said in text
    first, second = csv.DictReader((out / "comparison.csv").open())
    assert (first["last"], first["told.A"], first["format-free.B"]) == ("62.5", "80", "75")
    assert (second["method"], second["stored"], second["told.A"]) == ("old", "", "70")
    assert json.loads((out / "comparison.json").read_text())["methods"].keys() == {"ours", "old"}
    assert (out / "figures" / "accuracy_by_stored.png").is_file()
    table = (out / "comparison.md").read_text("utf-8")
    assert table.startswith("**Not finished, and not in these tables:**\n\n* lora-s1: it ended\n")
    assert "(ours 0, 1; old 0)" in table, "methods have not all the same seeds"
    assert json.loads((out / "comparison.json").read_text("utf-8"))["missing"] == ["lora-s1: it ended"]
    write_comparison(out, "mine", [old], {})
    assert "Not finished" not in (out / "comparison.md").read_text("utf-8")
    assert json.loads((out / "comparison.json").read_text("utf-8"))["missing"] == []


def test_the_figure_has_a_point_for_each_method_whose_size_is_known(tmp_path: Path) -> None:
    old = ComparedMethod("old", [run(tmp_path / "old", 0, (70.0, 50.0))])
    (axes,) = stored_figure([routed(tmp_path), old]).axes
    assert [container.get_label() for container in axes.containers] == ["ours"]
