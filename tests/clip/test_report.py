"""The page of a benchmark: tiles, intervals, figures, settings, and what a stopped or copied run lacks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.clip.benchmark.overview import image_count, line_interval
from pipeline.clip.benchmark.report import read_results, write_benchmark_report
from pipeline.config.paths import PROJECT
from pipeline.metrics.intervals import wilson
from tests.report.test_report import Page

KEPT = PROJECT / "tests" / "compat" / "kept"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A benchmark of an earlier version with results: a dataset, four methods, two seeds."""
    folder = tmp_path / "benchmark"
    shutil.copytree(KEPT / "runs" / "benchmark", folder)
    shutil.copy(KEPT / "finished" / "benchmark" / "results.json", folder / "results.json")
    return folder


def words(run: Path) -> str:
    return " ".join(" ".join(Page(write_benchmark_report(run).read_text("utf-8")).words).split())


def test_the_page_has_what_that_of_a_sequence_has(run: Path) -> None:
    text = write_benchmark_report(run).read_text("utf-8")
    page = Page(text)
    assert page.ids >= {"tiles", "results", "seeds", "accuracies-figure", "h-losses", "h-settings", "data"}
    assert page.tags.count("svg") == 2
    assert not {"script", "iframe"} & set(page.tags)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    said = words(run)
    for part in ("HM 50.00", "seeds 1, 2", "model models/clip", "train.lr 0.05", "started 2026-11-29", "5f629f34a25a"):
        assert part in said, part


def test_an_interval_counts_the_images_of_one_seed(run: Path) -> None:
    content = read_results(run)
    line = next(line for line in content["lines"] if line["method"] == "coop")
    assert image_count(content, line, "base") == 6
    assert line_interval(content, line, "base") == wilson(3, 6)
    assert line_interval(content, line, "all") is None
    assert "18.8–81.2" in words(run)


def test_units_without_a_result_are_named_with_the_command_that_goes_on(run: Path) -> None:
    content = (run / "run.json").read_text().replace('"mpl-toys-s2"', '"mpl-toys-s2", "mpl-toys-s3"')
    (run / "run.json").write_text(content)
    said = words(run)
    assert "have no result: " in said and "mpl-toys-s3" in said
    assert f"python -m pipeline run {run / 'config.yaml'}" in said


def test_results_alone_are_reported_with_what_is_missing(run: Path) -> None:
    for name in ("run.json", "config.yaml"):
        (run / name).unlink()
    shutil.rmtree(run / "units")
    said = words(run)
    assert "run.json is not in the run folder" in said and "config.yaml is not in the run folder" in said
