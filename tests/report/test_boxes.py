"""Boxes on the pictures of grounding answers: their unit, what is drawn, and what is left out."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data_prep.shards import write_shards
from pipeline.data.sample import Sample
from pipeline.report.boxes import EXPECTED, PIXELS, PREDICTED, Frame, frame_of, frames, unit_of
from pipeline.report.page import write_report
from pipeline.report.predictions import examples
from pipeline.runs.folder import read_run
from tests.report.test_report import make_run, prediction


@pytest.mark.parametrize(
    ("answers", "shown", "unit"),
    [
        (["[0.1, 0.2, 0.5, 1.0]", "nothing"], [], 1.0),
        (["[0,8,100,58]", "[17,0,58,42]"], [((17, 0, 58, 42), (48, 48))], 100.0),  # more than the picture's pixels
        (["[10,20,30,40]"], [((10, 20, 30, 40), (640, 480))], 100.0),
        (["[10,20,30,40]"], [((10, 20, 30, 40), (48, 48))], PIXELS),
        (["[10,20,600,400]"], [((10, 20, 600, 400), (640, 480))], PIXELS),
        (["[10,20,990,400]"], [((10, 20, 990, 400), (640, 480))], 1000.0),
        (["[10,20,990,4000]"], [((10, 20, 990, 4000), (640, 480))], None),
        (["[10,20,990,400]"], [], 1000.0),
        (["nothing", "[1, 2]"], [], None),
    ],
)
def test_the_unit_follows_from_the_tasks_boxes_and_pictures(
    answers: list[str], shown: list[tuple[tuple[float, float, float, float], tuple[int, int]]], unit: float | None
) -> None:
    assert unit_of(answers, shown) == unit


def test_a_box_is_a_part_of_its_picture_or_left_out() -> None:
    assert frame_of(EXPECTED, (10, 20, 60, 100), (200, 100), PIXELS) == Frame(EXPECTED, 5.0, 20.0, 25.0, 80.0)
    assert frame_of(EXPECTED, (0.5, 0.5, 1.01, 1.0), (9, 9), 1.0) == Frame(EXPECTED, 50.0, 50.0, 50.0, 50.0)
    assert frame_of(PREDICTED, (10, 20, 300, 90), (200, 100), PIXELS) is None
    assert frame_of(PREDICTED, (-10, 20, 30, 90), (200, 100), PIXELS) is None
    assert frame_of(PREDICTED, None, (200, 100), 1.0) is None
    assert frame_of(PREDICTED, (0.1, 0.1, 0.2, 0.2), (200, 100), None) is None


def test_the_expected_box_is_that_of_the_metric() -> None:
    found = frames("the dog", {"answer_bbox": [0.0, 0.0, 0.5, 0.5]}, "no box", (10, 10), 1.0)
    assert [frame.kind for frame in found] == [EXPECTED]


def grounding_run(folder: Path, said: str) -> Path:
    """A run whose task `boxes` has a picture and a box in percent, and the answer `said`."""
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), "red").save(buffer, "PNG")
    samples = [Sample("boxes-1", buffer.getvalue(), "Where?", "[25,50,75,100]", {})]
    test = folder / "data" / "boxes" / "test"
    write_shards(lambda start: iter(samples[start:]), test, 10, "made here", "boxes", "test")
    run = make_run(folder / "run", prepared=str(folder / "data"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["tasks"] = [{"name": name, "metric": "exact"} for name in ("colour", "count")]
    config["data"]["tasks"].append({"name": "boxes", "metric": "iou"})
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [prediction("boxes", 1, 3) | {"answer": "[25,50,75,100]", "prediction": said}]
    (run / "eval" / "after-03" / "boxes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return run


def test_both_boxes_are_drawn_on_the_picture_and_named_beside_it(tmp_path: Path) -> None:
    text = write_report(grounding_run(tmp_path, "[0,0,50,50]")).read_text("utf-8")
    assert '<rect class="expected" x="25.0" y="50.0" width="50.0" height="50.0"/>' in text
    assert '<rect class="predicted" x="0.0" y="0.0" width="50.0" height="50.0"/>' in text
    assert "expected box" in text and "predicted box" in text


def test_an_unreadable_answer_leaves_the_expected_box(tmp_path: Path) -> None:
    run = grounding_run(tmp_path, "there")
    (shown,) = [item for item in examples(read_run(run)) if item["image"]]
    assert [frame.kind for frame in shown["frames"]] == [EXPECTED]


def test_other_tasks_have_no_boxes_whatever_their_answers_look_like(tmp_path: Path) -> None:
    run = grounding_run(tmp_path, "[0,0,50,50]")
    config = (run / "config.yaml").read_text().replace("iou", "exact")
    (run / "config.yaml").write_text(config)
    assert "<rect class=" not in write_report(run).read_text("utf-8")
