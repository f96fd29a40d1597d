"""What routing costs on the report's page: told and routed scores, and the tasks that are taken for each other."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.shards import write_shards
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.report.confusion import confused_pairs, told_rows
from pipeline.report.page import comparison, write_report
from pipeline.report.routing_figure import FEW, MOST, confused_sets, routing_figures
from pipeline.report.summary import key_figures, matrix_table
from pipeline.report.tables import metric_rows
from pipeline.runs.folder import read_run
from pipeline.tracking.description import note
from tests.report.test_report import ATTACK, TASKS, Page, make_run, prediction

TOLD = [70.0, 88.0, 95.0]


def misrouted(number: int, taker: str, score: float = 0.0) -> dict[str, Any]:
    """A sample of the task colour for which the set of another one ranks first."""
    line = prediction("colour", number, 3)
    similarity = [0.9 if name == taker else 0.5 if name == "colour" else 0.1 for name in TASKS]
    return {**line, "similarity": similarity, "selected": [taker], "prediction": f"by {taker}", "score": score}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_matrix(run: Path, **fields: Any) -> None:
    path = run / "matrix.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in which four of ten samples of colour go to count, one to boxes, and one of count to colour."""
    run = make_run(tmp_path / "run")
    lines = [prediction("colour", number, 3) for number in range(5)]
    lines += [misrouted(5, "boxes"), misrouted(6, "count", 1.0), *(misrouted(number, "count") for number in (7, 8, 9))]
    write_lines(run / "eval" / "after-03" / "colour.jsonl", lines)
    changed = [{**line, "prediction": f"red & {ATTACK}", "selected": ["colour"], "score": 1.0} for line in lines[5:9]]
    write_lines(run / "eval" / "told-03" / "colour.jsonl", changed)
    write_lines(
        run / "eval" / "after-03" / "count.jsonl",
        [prediction("count", 0, 3), {**prediction("count", 1, 3), "similarity": [0.9, 0.8, 0.1]}],
    )
    confusion = {"colour": {"colour": 50.0, "count": 40.0, "boxes": 10.0}, "count": {"count": 50.0, "colour": 50.0}}
    routing = {"accuracy": [50.0, 50.0, 100.0], "confusion": {**confusion, "boxes": {"boxes": 100.0}}}
    change_matrix(run, told=[None, None, TOLD], routing=routing)
    return run


def test_the_table_has_told_routed_and_lost_of_each_task_and_their_means(run: Path) -> None:
    rows = {row["name"]: row for row in told_rows(read_run(run))}
    assert list(rows) == [*TASKS, "mean"]
    assert [rows["colour"][name] for name in ("told", "routed", "lost", "right")] == [70.0, 60.0, 10.0, 50.0]
    assert rows["colour"]["taken_by"] == "count (40.0 %)" and rows["boxes"]["taken_by"] == ""
    assert rows["mean"]["told"] == pytest.approx(sum(TOLD) / 3) and rows["mean"]["lost"] == pytest.approx(10 / 3)
    page = Page(write_report(run).read_text("utf-8"))
    assert {"told", "confused"} <= page.ids
    assert {"count (40.0 %)", "70.0", "84.3", "3.3", "lost to routing"} <= set(page.words)


def test_the_metrics_of_a_run_say_what_routing_costs(run: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other")
    rows = {name: values for name, _, values in metric_rows([read_run(run), read_run(other)])}
    assert rows["told"] == [pytest.approx(sum(TOLD) / 3), None] and rows["routing_loss"] == [
        pytest.approx(10 / 3),
        None,
    ]
    assert "lost to routing 3.3" in key_figures(read_run(run)) and "lost" not in key_figures(read_run(other))
    assert matrix_table(read_run(run)).row_count == 5 and matrix_table(read_run(other)).row_count == 4
    free = {"accuracy": [[None] * 3, [None] * 3, [91.0, 92.0, 93.0]], "zero_shot": [51.0, 52.0, 53.0]}
    change_matrix(run, format_free=free)
    shown = matrix_table(read_run(run))
    cells = dict(zip(shown.columns[0].cells, shown.columns[3].cells, strict=True))
    found = {" ".join(str(name).split()): value for name, value in cells.items()}
    assert (found["zero-shot, format-free"], found["the same, format-free"]) == ("53.0", "93.0")
    assert "| the same, task told | 70.0 | 88.0 | 95.0 |" in note(read_run(run)) and "told" not in note(read_run(other))
    metrics = comparison([run, other])["metrics"]
    assert metrics["run"]["routing_loss"] == pytest.approx(10 / 3) and "told" not in metrics["other"]


def test_pairs_are_ordered_by_their_share_and_show_first_what_telling_would_mend(run: Path) -> None:
    pairs = confused_pairs(read_run(run))
    found = [(pair["task"], pair["taken_by"], pair["percent"], pair["samples"]) for pair in pairs]
    assert found == [("count", "colour", 50.0, 1), ("colour", "count", 40.0, 4), ("colour", "boxes", 10.0, 1)]
    assert (pairs[1]["routed"], pairs[1]["told"]) == (25.0, 75.0)
    assert [item["id"] for item in pairs[1]["examples"]] == ["colour-7", "colour-8", "colour-6"]
    first = pairs[1]["examples"][0]
    assert (first["routed"], first["told"], first["right"], first["told_right"]) == (
        "by count",
        f"red & {ATTACK}",
        False,
        True,
    )
    # Of the task count nothing is in the folder: no answer would be another.
    assert (pairs[0]["routed"], pairs[0]["told"]) == (100.0, 100.0)


def test_answers_of_pairs_are_escaped_and_come_with_their_pictures(run: Path, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(buffer, "PNG")
    samples = [Sample(f"colour-{number}", buffer.getvalue(), "Which colour?", "red", {}) for number in range(10)]
    folder = tmp_path / "data" / "colour" / "test"
    write_shards(lambda start: iter(samples[start:]), folder, 10, "made here", "colour", "test")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("nowhere", str(tmp_path / "data")))
    text = write_report(run).read_text("utf-8")
    assert "<script" not in text and "red &amp; &lt;script&gt;" in text
    assert 'alt="image of sample colour-7"' in text
    assert all(item["image"] for item in confused_pairs(read_run(run))[1]["examples"])


def test_a_run_of_an_earlier_version_shows_its_pairs_without_what_was_not_measured(run: Path) -> None:
    matrix = json.loads((run / "matrix.json").read_text())
    del matrix["told"], matrix["routing"]["confusion"]
    (run / "matrix.json").write_text(json.dumps(matrix))
    found = read_run(run)
    assert told_rows(found) == [] and found.told_scores is None
    pairs = confused_pairs(found)
    assert [pair["percent"] for pair in pairs] == [50.0, 40.0, 10.0]
    assert all(pair["told"] is None and pair["examples"][0]["told"] is None for pair in pairs)
    page = Page(write_report(run).read_text("utf-8"))
    assert "confused" in page.ids and "told" not in page.ids


def test_answers_that_were_told_after_another_stage_are_not_shown(run: Path) -> None:
    rows = json.loads((run / "matrix.json").read_text())["accuracy"]
    change_matrix(run, accuracy=[*rows[:2], [60.0, None, None]], told=[None, [90.0, 85.0, None]])
    found = read_run(run)
    assert found.told_scores == [90.0, 85.0, None] and found.told_predictions() == {}
    assert all(pair["told"] is None for pair in confused_pairs(found))
    write_report(run)


def test_methods_without_a_router_confuse_nothing(tmp_path: Path) -> None:
    assert confused_pairs(read_run(make_run(tmp_path / "run", method="sequential"))) == []


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"told": "all"}, "told: found 'all', expected a list"),
        ({"told": [[1.0, "x", None]]}, "told.0.*: found 'x', expected a number"),
        ({"told": [None, [1.0]]}, r"1 scores in told\.1; expected 3"),
        ({"routing": {"confusion": [1]}}, "confusion: found"),
    ],
)
def test_damaged_costs_are_named(run: Path, fields: dict[str, Any], sentence: str) -> None:
    change_matrix(run, **fields)
    with pytest.raises(UserError, match=sentence):
        write_report(run)


def test_damaged_told_predictions_are_named(run: Path) -> None:
    write_lines(run / "eval" / "told-03" / "colour.jsonl", [{"id": "colour-7", "score": "high"}])
    with pytest.raises(UserError, match=r"told-03/colour\.jsonl, line 1: score: found 'high', expected a number"):
        write_report(run)


def many(count: int) -> tuple[list[str], dict[str, dict[str, float]]]:
    """So many tasks with long names, of which every fifth loses samples to the next one."""
    tasks = [f"CountsInPhotographs{number}" for number in range(count)]
    table = {task: {task: 100.0} for task in tasks}
    for number in range(0, count - 1, 5):
        table[tasks[number]] = {tasks[number]: 70.0, tasks[number + 1]: 30.0}
    return tasks, table


def test_the_confusion_of_forty_tasks_has_a_figure_of_its_own_that_fits_a_page() -> None:
    tasks, table = many(40)
    nearest, inserted = routing_figures({"nearest": table, "inserted": table}, tasks)
    for figure, title in ((nearest, "nearest"), (inserted, "inserted")):
        (axes,) = figure.axes
        assert axes.get_xlabel() == title
        assert [label.get_text() for label in axes.get_yticklabels()] == tasks
        assert len(axes.texts) == 40 + 8  # nothing stands in a cell without samples
        assert max(figure.get_size_inches()) < 15
    tasks, table = many(FEW)
    (both,) = routing_figures({"nearest": table, "inserted": table}, tasks)
    assert len(both.axes) == 2


def test_of_more_tasks_than_a_figure_holds_the_confused_ones_are_drawn() -> None:
    tasks, table = many(200)
    shown = confused_sets(table, tasks)
    assert len(shown) == MOST and shown == [task for task in tasks if task in shown]
    confused = {name for number in range(0, 120, 5) for name in tasks[number : number + 2]}
    assert set(shown) == confused
    (figure,) = routing_figures({"nearest": table}, tasks)
    assert len(figure.axes[0].get_yticklabels()) == MOST
