"""What `check` shows of a benchmark with many datasets and methods: readable rows, and warnings that are seen."""

from __future__ import annotations

import pytest

from pipeline.check.clip import _in_short, _ranks, _recipe, _steps
from pipeline.check.findings import Findings, counted, show
from pipeline.clip.recipe import load_benchmark


def test_the_steps_of_many_datasets_are_a_line_for_each_method() -> None:
    recipe, findings = load_benchmark("base2new_vitb16"), Findings()
    lines = _steps(findings, recipe).splitlines()
    learned = [method.name for method in recipe.methods if method.kind != "zero_shot"]
    assert [line.split()[0] for line in lines] == learned
    assert all(len(line) < 120 for line in lines)


def test_a_batch_that_is_too_large_is_a_warning_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    recipe, findings = load_benchmark("base2new_vitb16"), Findings(found={"steps": "coop 800"})
    _steps(findings, recipe)
    (warning, *_) = findings.warnings["steps"]
    assert "eurosat (80 images" in warning and "set a smaller train.global_batch" in warning
    assert findings.to_json()["warnings"] == findings.warnings and findings.to_json()["ok"] is True
    show(findings, "base2new_vitb16")
    shown = capsys.readouterr().out
    assert "warning: steps: the batch of" in shown and "!" in shown


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ({"a": 5, "b": 5}, "coop 5"),
        ({"a": 5, "b": 5, "c": 7}, "coop 5, but c 7"),
        ({"a": 1, "b": 2, "c": 3}, "coop 1 (a) to 3 (c)"),
    ],
)
def test_one_number_and_its_exceptions_or_a_range(steps: dict[str, int], text: str) -> None:
    assert _in_short("coop", steps) == text


def test_methods_with_the_same_batch_are_named_together() -> None:
    row = _ranks(load_benchmark("base2new_vitb16"), 2)
    assert row.count(" x ") < len(load_benchmark("base2new_vitb16").methods)


def test_one_thing_is_counted_as_one() -> None:
    assert (counted(1, "task"), counted(2, "task"), counted(0, "task")) == ("1 task", "2 tasks", "0 tasks")
    assert "1 method, 1 dataset, 1 seed" in _recipe(load_benchmark("base2new_nano", ["methods=[mpl]", "seeds=[1]"]))
