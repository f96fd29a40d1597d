"""Examples: pages, filters, search, pictures and boxes, read by position from files of any length."""

from __future__ import annotations

import io
import json
import threading
from itertools import chain
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.report.boxes import PIXELS, Frame
from pipeline.runs.folder import read_run
from pipeline.ui import predictions as module
from pipeline.ui.boxes import answered_frames, frames, unit_of
from pipeline.ui.examples import PER_PAGE, Evaluation, Wanted
from pipeline.ui.pictures import Samples
from pipeline.ui.predictions import Predictions, Unready
from pipeline.ui.web import PageError
from tests import tiny
from tests.report.test_report import ATTACK, make_run
from tests.ui.made import BOX, MOVED, Browser, change_lines, run_with_pictures


def ids(run: Path, **filters: Any) -> list[str]:
    evaluation = Evaluation(read_run(run), Predictions(60), filters.pop("stage", ""))
    return [item["id"] for item in evaluation.find(Wanted(**filters)).items]


def test_filters_narrow_what_is_shown(run: Path) -> None:
    assert len(ids(run)) == PER_PAGE and ids(run, page=2) == ["boxes-2", "boxes-3"]
    assert ids(run, task="count") == [f"count-{n}" for n in range(4)]
    assert ids(run, show="wrong") == ["colour-0", "count-0", "boxes-0"]
    assert ids(run, show="right", task="boxes") == ["boxes-1", "boxes-2", "boxes-3"]
    assert ids(run, show="misrouted") == ["boxes-0"] == ids(run, task="boxes", first="colour")
    assert ids(run, show="unfamiliar") == []
    assert ids(run, text="BOXES-") == [f"boxes-{n}" for n in range(4)]  # in the id, whatever the case
    assert ids(run, text="COLOUR & shape") == ids(run) and ids(run, text="score") == []  # names of fields are no text
    assert ids(run, stage="after-01") == [f"colour-{n}" for n in range(4)]
    assert ids(run, page=9) == []


def test_a_page_is_the_same_as_a_list_cut_into_pages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for task, number in (("colour", 13), ("count", 0), ("boxes", 29)):
        lines = [json.dumps({"id": f"{task}{n}", "score": n % 2, "similarity": [1.0, 0.0, 0.5]}) for n in range(number)]
        (run / "eval" / "after-03" / f"{task}.jsonl").write_text("\n".join(lines))
    whole = [f"colour{n}" for n in range(13)] + [f"boxes{n}" for n in range(29)]
    found = [ids(run, page=page) for page in range(1, 7)]
    assert list(chain.from_iterable(found)) == whole and [len(page) for page in found] == [10, 10, 10, 10, 2, 0]
    odd = [name for name in whole if int(name.lstrip(ascii_lowercase)) % 2]
    assert [name for page in (1, 2, 3) for name in ids(run, show="right", page=page)] == odd
    assert ids(run, show="misrouted", page=3) == [f"boxes{n}" for n in range(20, 29)]


def test_lines_that_are_damaged_or_being_written_are_left_out_and_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = run / "eval" / "after-03" / "count.jsonl"
    lines = [json.dumps({"id": f"é{n}", "similarity": odd}) for n, odd in enumerate(("x", None, [1, "a"], {"a": 1}))]
    file.write_text(lines[0] + "\n[1, 2]\n\n" + "\n".join(lines[1:]) + '\n{"id": "bei', "utf-8")
    evaluation = Evaluation(read_run(run), Predictions(60))
    found = evaluation.find(Wanted(task="count"))
    assert [item["id"] for item in found.items] == ["é0", "é1", "é2", "é3"] and found.damaged == 2
    assert [item["id"] for item in evaluation.find(Wanted(text="É2")).items] == ["é2"]
    assert "2 damaged or unfinished lines" in Browser(run).page("/run/run/examples?task=count")


def test_a_file_is_indexed_once_and_again_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[Path]()
    index = module._index

    def counted(path: Path, progress: Any) -> Any:
        made.append(path)
        return index(path, progress)

    monkeypatch.setattr(module, "_index", counted)
    evaluation = Evaluation(read_run(make_run(tmp_path / "run")), Predictions(60))
    for _ in range(3):
        evaluation.find(Wanted(task="colour"))
    assert len(made) == 1
    change_lines(tmp_path / "run" / "eval" / "after-03" / "colour.jsonl", lambda n, line: {**line, "id": f"new-{n}"})
    assert evaluation.find(Wanted(task="colour")).items[0]["id"] == "new-0" and len(made) == 2


def test_a_page_reads_only_its_own_lines(tmp_path: Path) -> None:
    """Of a file with many lines, a page parses ten: all others can be garbage once the index is made."""
    file, lines = tmp_path / "many.jsonl", 5000
    content = "".join(json.dumps({"id": f"{n:06d}", "score": 1}) + "\n" for n in range(lines))
    file.write_text(content)
    index = Predictions(60).index(file)
    width = len(content) // lines
    kept = range(4000 * width, 4010 * width)
    file.write_bytes(bytes(byte if place in kept else 0 for place, byte in enumerate(content.encode())))
    assert [line["id"] for line in index.lines(range(4000, 4010))] == [f"{n:06d}" for n in range(4000, 4010)]
    assert index.nbytes <= 21 * lines


def test_while_an_index_is_made_the_page_says_so_and_reloads(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, index = threading.Event(), module._index

    def slow(path: Path, progress: Any) -> Any:
        progress.read, progress.size = 3, 4
        assert go_on.wait(60)
        return index(path, progress)

    monkeypatch.setattr(module, "_index", slow)
    browser = Browser(run)
    browser.site.predictions._patience = 0.05
    text = browser.page("/run/small-s3/examples?task=count")
    assert "75 % of the predictions are read" in text and 'http-equiv="refresh"' in text
    assert "Routing is being counted: 0 % of the predictions are read" in browser.page("/run/small-s3/")
    assert browser.client.get("/run/small-s3/picture?task=count&row=1").status_code == 503
    go_on.set()
    browser.site.predictions._patience = 60
    assert "4 examples" in browser.page("/run/small-s3/examples?task=count")


def test_an_example_shows_picture_boxes_sets_and_answers(browser: Browser) -> None:
    text = browser.page("/run/small-s3/examples?task=boxes")
    assert '<rect class="expected" x="10.0" y="20.0" width="50.0" height="50.0"' in text
    assert '<rect class="predicted" x="90.0" y="90.0" width="10.0" height="10.0"' in text
    assert MOVED in text and "misrouted" in text and "0.800" in text
    assert 'href="chat?stage=after-03&amp;task=boxes&amp;row=0"' in text
    attack = browser.page("/run/small-s3/examples?task=colour")
    assert ATTACK not in attack and "&lt;script&gt;alert(1)&lt;/script&gt;" in attack and "<rect" not in attack
    small = browser.client.get("/run/small-s3/picture?task=boxes&row=2")
    with Image.open(io.BytesIO(small.content)) as picture:
        assert (small.headers["content-type"], picture.getpixel((0, 0))) == ("image/png", (120, 180, 200))


def test_filters_are_links_that_keep_the_others(browser: Browser) -> None:
    text = browser.page("/run/small-s3/examples?task=boxes&show=wrong&text=box&page=1")
    assert 'href="?task=boxes&amp;show=wrong&amp;text=box&amp;stage=after-02"' in text
    assert 'href="?task=count&amp;show=wrong&amp;text=box"' in text
    assert 'rel="next"' not in text and 'rel="next"' in browser.page("/run/small-s3/examples")


@pytest.mark.parametrize(
    ("query", "status", "expected"),
    [
        ("page=x", 400, "page is 'x'; expected a whole number from 1."),
        ("page=-1", 400, "page is '-1'"),
        ("page=٣", 400, "page is '٣'; expected a whole number"),
        ("show=good", 400, "show is 'good'; expected one of: all, wrong"),
        (
            "task=colours",
            404,
            "there are no predictions of the task 'colours'",
        ),
        ("task=../../run", 404, "there are no predictions of the task '../../run'"),
        ("stage=../eval/after-01", 404, "there is no evaluation '../eval/after-01'"),
        ("first=blue", 404, "there is no set 'blue'; expected one of: colour, count, boxes."),
        ("stage=zero-shot", 404, "there is no evaluation 'zero-shot'"),
    ],
)
def test_wrong_filters_are_refused_with_a_sentence(browser: Browser, query: str, status: int, expected: str) -> None:
    assert browser.fault(f"/run/small-s3/examples?{query}", status).startswith(expected.split(";")[0])


@pytest.mark.parametrize("row", ["99", "-1", "x", "", "9" * 30])
def test_there_is_no_picture_of_what_is_no_prediction(browser: Browser, row: str) -> None:
    assert browser.client.get(f"/run/small-s3/picture?task=colour&row={row}").status_code in (400, 404)


def test_no_task_of_a_foreign_run_leads_out_of_its_folder(tmp_path: Path) -> None:
    run = run_with_pictures(tmp_path)
    secret = tmp_path / "secret.jsonl"
    secret.write_text(json.dumps({"id": "secret"}))
    matrix = json.loads((run / "matrix.json").read_text())
    matrix["tasks"][0] = "../../../secret"
    (run / "matrix.json").write_text(json.dumps(matrix))
    browser = Browser(run)
    assert "secret" not in browser.page("/run/small-s3/examples").replace("../../../secret", "")
    assert browser.client.get("/run/small-s3/examples?task=../../../secret").status_code == 404
    (run / "eval" / "after-03" / "colour.jsonl").unlink()
    (run / "eval" / "after-03" / "colour.jsonl").symlink_to(secret)
    matrix["tasks"][0] = "colour"
    (run / "matrix.json").write_text(json.dumps(matrix))
    assert "secret" not in browser.page("/run/small-s3/examples")


def test_data_that_is_not_here_or_was_prepared_anew_costs_only_the_pictures(tmp_path: Path) -> None:
    run = run_with_pictures(tmp_path)
    browser = Browser(run)
    assert "<img src" in browser.page("/run/small-s3/examples")
    (tmp_path / "data-small-s3" / "colour" / "test" / "dataset.json").write_text("{")
    text = browser.page("/run/small-s3/examples?task=colour")
    assert "colour-1" in text and "<img src" not in text
    assert "not on this machine" in browser.fault("/run/small-s3/picture?task=colour&row=1", 404)
    change_lines(run / "eval" / "after-03" / "count.jsonl", lambda n, line: {**line, "id": ["count-3", "gone"][n % 2]})
    sample = Samples().sample(read_run(run), "count", 0, "count-3")
    assert sample is not None and sample.id == "count-3" and Samples().sample(read_run(run), "count", 1, "gone") is None


@pytest.mark.parametrize(
    ("boxes", "side", "unit"),
    [
        (["[0.1, 0.2, 0.5, 1.0]"], 400, 1.0),
        (["[10, 20, 60, 90]", "[0, 0, 100, 100]"], 32, 100.0),
        (["[10, 20, 60, 90]"], 640, 100.0),
        (["[10, 20, 30, 31]"], 32, PIXELS),
        (["[10, 20, 600, 300]"], 640, PIXELS),
        (["[10, 20, 900, 300]"], 640, 1000.0),
        (["[10, 20, 3000, 300]"], 640, None),
        (["nothing"], 640, None),
    ],
)
def test_the_unit_of_boxes_is_what_the_expected_ones_fit(boxes: list[str], side: int, unit: float | None) -> None:
    class Split:
        sizes = np.full((len(boxes), 2), side)

        def __len__(self) -> int:
            return len(boxes)

        def text(self, place: int) -> Any:
            return type("Text", (), {"answer": boxes[place], "meta": {}})

    class Opened(Samples):
        def split(self, run: Any, task: str) -> Any:
            return Split()

    run = type("Run", (), {"config": {"data": {"tasks": [{"name": "boxes", "metric": "grounding"}]}}})()
    assert unit_of(Opened(), run, "boxes") == unit
    assert unit_of(Opened(), run, "other") is None  # not scored by a box


def test_a_box_is_drawn_where_it_is_on_the_picture(run: Path) -> None:
    picture = tiny.png((1, 2, 3), 50)
    assert answered_frames(100.0, picture, BOX) == [Frame("predicted", 10.0, 20.0, 50.0, 50.0)]
    assert answered_frames(PIXELS, picture, "[5, 10, 50, 25]") == [Frame("predicted", 10.0, 20.0, 90.0, 30.0)]
    for answer in ("[5, 10, 500, 25]", "[-5, 1, 2, 3]", "red", ""):
        assert answered_frames(PIXELS, picture, answer) == []
    assert answered_frames(PIXELS, b"no picture", BOX) == [] and frames(1.0, None, BOX) == []


def test_an_unknown_evaluation_and_what_is_unready_are_named(run: Path) -> None:
    with pytest.raises(PageError, match="expected one of: after-01, after-02, after-03"):
        Evaluation(read_run(run), Predictions(), "after-09")
    assert str(Unready(12.4)) == "12 % of the predictions are read"
