"""The head of a report and its last section: tiles, intervals, what is missing, settings, data, commit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.report.headline import tiles
from pipeline.report.missing import missing
from pipeline.report.numbers import fixed, limits, percent, spread
from pipeline.report.page import write_report
from pipeline.report.scores import overall, points, score_rows
from pipeline.report.settings import all_settings, data_rows, main_settings, provenance_facts
from pipeline.report.summary import matrix_table
from pipeline.runs import provenance
from pipeline.runs.folder import read_run
from pipeline.runs.rows import score_rows as score_rows_of
from pipeline.tracking.description import note
from tests.report.test_report import TASKS, Page, make_run, prediction


def scored_run(folder: Path, right: int = 75, of: int = 100, **state: Any) -> Path:
    """A finished run whose last scores are those of its predictions: so many right of so many, for every task."""
    run = make_run(folder, **state)
    for task in TASKS:
        lines = [prediction(task, number, 3) | {"score": float(number < right)} for number in range(of)]
        (run / "eval" / "after-03" / f"{task}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    matrix = json.loads((run / "matrix.json").read_text())
    matrix["accuracy"][2] = [100.0 * right / of] * 3
    (run / "matrix.json").write_text(json.dumps(matrix | {"majority": [10.0, 20.0, 30.0]}))
    return run


def words(run: Path, *others: Path) -> str:
    return " ".join(" ".join(Page(write_report(run, others).read_text("utf-8")).words).split())


def tile(run: Path, name: str, *others: Path) -> tuple[str, str]:
    runs = [read_run(path) for path in (run, *others)]
    return next((found.value, found.text) for found in tiles(runs[0], runs) if found.name == name)


def test_the_tiles_say_how_good_a_run_is_and_what_that_stands_on(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "run")
    assert tile(run, "last") == ("75.0", "mean score; 95 %: 69.6–79.3")
    assert tile(run, "forgetting")[0] == percent(read_run(run).metrics()["forgetting"])
    assert tile(run, "routing")[0] == "98.0"
    assert tile(run, "gain") == ("73.0", "last minus zero-shot; majority answer 20.0, zero-shot 2.0")
    assert tile(run, "test samples") == ("300", "of 3 tasks")
    assert tile(run, "told − routed") == ("–", "not measured")
    assert "one seed" in tile(run, "over seeds")[1]


def test_the_verdict_is_the_first_that_a_page_says_below_its_title(tmp_path: Path) -> None:
    page = write_report(scored_run(tmp_path / "run"), verdict=["count was not learned: <no>."]).read_text("utf-8")
    said = page.index("count was not learned: &lt;no&gt;.")
    assert page.index("<h1>") < said < page.index('id="tiles"')
    assert 'id="verdict"' not in write_report(tmp_path / "run").read_text("utf-8")


def test_the_deviation_over_seeds_is_that_of_the_runs_own_recipe(tmp_path: Path) -> None:
    runs = [scored_run(tmp_path / f"s{seed}", right) for seed, right in ((0, 70), (1, 80))]
    for seed, run in enumerate(runs):
        config = yaml.safe_load((run / "config.yaml").read_text()) | {"seed": seed}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    other = scored_run(tmp_path / "other", 10, recipe="another")
    assert tile(runs[0], "over seeds", runs[1], other) == ("± 7.1", "deviation of last, mean 75.0; seeds 0, 1")
    assert tile(other, "over seeds", *runs)[0] == "–"


def test_an_interval_needs_the_predictions_that_the_score_was_made_of(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "run")
    rows = {row["task"]: row for row in score_rows(read_run(run))}
    low, high = rows["count"]["interval"]
    assert (rows["count"]["samples"], round(low, 1), round(high, 1)) == (100, 65.7, 82.5)
    matrix = json.loads((run / "matrix.json").read_text())
    matrix["accuracy"][2][1] = 74.0  # not the mean of its predictions any more
    (run / "matrix.json").write_text(json.dumps(matrix))
    found = read_run(run)
    assert points(found, "count") is None and points(found, "boxes") is not None
    assert overall(found) == (None, None)
    assert any("No interval for count" in sentence for sentence in missing(found))


def test_a_score_of_a_whole_test_set_has_no_interval(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "run")
    lines = [{"id": str(number), "prediction": "a", "answer": "b", "score": None} for number in range(5)]
    (run / "eval" / "after-03" / "count.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert points(read_run(run), "count") is None
    assert tile(run, "last") == ("75.0", "mean score")


def test_a_whole_run_lacks_nothing_but_its_pictures(tmp_path: Path) -> None:
    (sentence,) = missing(read_run(scored_run(tmp_path / "run")))
    assert sentence.startswith("The prepared data is not on this machine")


@pytest.mark.parametrize(
    ("status", "ended"), [("failed", "ended with an error"), ("stopped", "was stopped"), ("running", "still running")]
)
def test_an_unfinished_run_says_what_is_missing_and_which_command_goes_on(
    tmp_path: Path, status: str, ended: str
) -> None:
    run = make_run(tmp_path / "run", stages=2, status=status)
    begun = run / "stages" / "03-boxes.unfinished"
    begun.mkdir()
    text = words(run)
    assert "2 of 3 stages are trained" in text and ended in text
    assert f"python -m pipeline run {run / 'config.yaml'}" in text
    assert "Stage 03-boxes has begun and is not finished." in text
    assert "mean score after 2 of 3 stages" in text


def test_stages_without_scores_are_missing_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    matrix = json.loads((run / "matrix.json").read_text())
    matrix["accuracy"][2] = [None] * 3
    (run / "matrix.json").write_text(json.dumps(matrix))
    shutil.rmtree(run / "eval" / "after-03")
    assert "3 stages are trained and 2 scored" in words(run)


def test_a_folder_with_its_matrix_alone_is_reported_with_what_it_lacks(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    (run / "run.json").unlink()
    text = words(run)
    assert "run.json is not in the run folder" in text and "config.yaml is not in the run folder" in text
    assert "its settings are unknown" in text


def test_settings_data_and_commit_stand_on_the_page(tmp_path: Path) -> None:
    splits = {"train": {"fingerprint": "a" * 64, "samples": 1000, "used": 950}}
    run = scored_run(tmp_path / "run", commit="b" * 40, uncommitted=True, data={"colour": splits})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["train"] = {"steps": 150, "epochs": 3.0, "lr_prompt": 0.01}
    config["tracking"] = {"uri": "postgresql://someone:secret@host/db"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = words(run)
    assert "train.lr_prompt 0.01" in text and "train.steps 150" in text
    assert "a" * 12 in text and "a" * 13 not in text
    assert f"commit {'b' * 12}, with uncommitted changes" in text
    assert "secret" not in (run / "report.html").read_text("utf-8")
    named = dict(main_settings(read_run(run).config))
    assert "train.epochs" not in named and "train.epochs" in all_settings(read_run(run).config)


@pytest.mark.parametrize("data", [None, 3, {"colour": 3}, {"colour": {"train": {"samples": "x"}}}])
def test_damaged_provenance_costs_its_own_entries_alone(tmp_path: Path, data: Any) -> None:
    state = {"data": data, "timing": 3, "versions": None, "commit": None}
    assert all(row["samples"] is None for row in data_rows(state))
    assert provenance_facts(state) == []
    assert "75.0" in words(scored_run(tmp_path / "run", **state))


def test_run_json_names_the_commit_that_wrote_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "c" * 40 + "\n", "status": " M pipeline/x.py\n"}
    provenance.code.cache_clear()
    monkeypatch.setattr(provenance, "_git", lambda *arguments: answers[arguments[0]])
    assert provenance.code() == {"commit": "c" * 40, "uncommitted": True}
    provenance.code.cache_clear()
    monkeypatch.setattr(provenance, "_git", lambda *arguments: None)
    assert provenance.code() == {}
    provenance.code.cache_clear()


def test_numbers_have_a_minus_sign_and_no_negative_zero() -> None:
    assert [percent(-0.04), percent(-0.06), percent(-13.5), percent(None)] == ["0.0", "−0.1", "−13.5", "–"]
    assert fixed(-1234567.0, 0) == "−1\N{NARROW NO-BREAK SPACE}234\N{NARROW NO-BREAK SPACE}567"
    assert (spread((1.0, 0.25)), limits((1.0, 20.04)), limits(None)) == ("1.0 ± 0.2", "1.0–20.0", "–")


def test_rows_have_one_order_wherever_they_are_shown(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "run")
    labels = [row.label for row in score_rows_of(read_run(run))]
    assert labels == ["majority answer", "zero-shot", "after colour", "after count", "after boxes"]
    page = write_report(run).read_text("utf-8")
    shown = re.findall(r'<tr class="(?:reference|stage|last)"><th scope="row">([^<]+)', page)
    assert shown == [*labels, "retention"]
    assert [str(cell) for cell in matrix_table(read_run(run)).columns[0].cells] == labels
    described = [line.split("|")[1].strip() for line in note(read_run(run)).splitlines()[4:]]
    assert described == labels
