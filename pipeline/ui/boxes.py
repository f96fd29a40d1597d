"""Boxes on pictures: those in the answers of tasks that are scored by their box, in percent of a picture's sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.image_limits import plan_image
from pipeline.data.pictures import read_header
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.metrics.boxes import Box, parse_box, true_box
from pipeline.runs.folder import RunFolder
from pipeline.ui.pictures import LIMITS, Samples

METRICS = ("iou", "grounding")
EDGE = 1.02  # a coordinate may be a little over the picture's edge by rounding
LOOKED_AT = 64  # samples that a task's unit is taken from
PIXELS = 0.0  # the unit of coordinates in pixels; others are the length of a picture's side


@dataclass(frozen=True)
class Frame:
    """A box in percent of a picture's sides, and whose it is: `given` for the expected one, `answered`."""

    kind: str
    left: float
    top: float
    width: float
    height: float


def unit_of(samples: Samples, run: RunFolder, task: str) -> float | None:
    """What a picture's side counts in a task's boxes: 1, 100, 1000, or PIXELS; None where boxes cannot be drawn.

    Nothing records it, so it is what the expected boxes of the first test samples fit best: pixels only where all of
    these boxes are on their pictures and the pictures are not much larger than all boxes together.
    """
    split = samples.split(run, task) if metric_of(run, task) in METRICS else None
    if split is None:
        return None
    places = range(min(LOOKED_AT, len(split)))
    try:
        texts = [split.text(place) for place in places]
    except (UserError, OSError):
        return None
    found = [(box, split.sizes[n]) for n, text in enumerate(texts) if (box := true_box(text.answer, text.meta))]
    found = [(box, size) for box, size in found if min(size) > 0]
    if not found:
        return None
    boxes, sizes = np.array([box for box, _ in found]), np.array([size for _, size in found])
    largest, smallest_side = float(boxes.max()), int(sizes.min())
    on_pictures = bool((boxes[:, 2:] <= EDGE * sizes).all())
    for unit, most in ((1.0, EDGE), (100.0, 100.0 * EDGE), (1000.0, 1000.0 * EDGE)):
        if largest <= most and (unit == 1.0 or not on_pictures or smallest_side > 1.25 * unit):
            return unit
    return PIXELS if on_pictures else None


def frames(unit: float | None, sample: Sample | None, answer: str) -> list[Frame]:
    """The boxes to draw on a sample's picture: the expected one and the answered one, where they are on it."""
    if unit is None or sample is None or sample.image is None:
        return []
    found = {"given": true_box(sample.answer, sample.meta), "answered": parse_box(answer)}
    return _frames(found, unit, sample.image)


def answered_frames(unit: float | None, picture: bytes, answer: str) -> list[Frame]:
    """The box in an answer to a question about a picture, where the answer is one."""
    return [] if unit is None else _frames({"answered": parse_box(answer)}, unit, picture)


def metric_of(run: RunFolder, task: str) -> str:
    """The metric that the run's recipe names for a task; "" where it names none."""
    tasks = run.config.get("data", {}).get("tasks") or []
    return str(next((one.get("metric") for one in tasks if one.get("name") == task), None) or "")


def _frames(boxes: dict[str, Box | None], unit: float, picture: bytes) -> list[Frame]:
    size = (unit, unit) if unit != PIXELS else _size(picture)
    frames = [_frame(kind, box, size) for kind, box in boxes.items() if box is not None]
    return [frame for frame in frames if frame is not None]


def _frame(kind: str, box: Sequence[float], size: tuple[float, float]) -> Frame | None:
    """A box in percent; None for one that is not on the picture."""
    if min(size) <= 0 or min(box) < 0 or box[2] > EDGE * size[0] or box[3] > EDGE * size[1]:
        return None
    left, top, right, bottom = (
        round(100 * min(1.0, side / whole), 2) for side, whole in zip(box, (*size, *size), strict=True)
    )
    return Frame(kind, left, top, round(right - left, 2), round(bottom - top, 2))


def _size(encoded: bytes) -> tuple[float, float]:
    """Width and height of the upright picture; zeros where it cannot be read."""
    try:
        plan_image(encoded, LIMITS)
        header = read_header(encoded)
    except (UserError, OSError):
        return 0, 0
    return header.width, header.height
