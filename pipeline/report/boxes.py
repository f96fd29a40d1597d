"""Boxes of grounding answers, to be drawn on the sample's picture: the expected one and the predicted one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.metrics.boxes import Box, parse_box, true_box
from pipeline.runs.folder import RunFolder

METRICS = ("iou", "iou_compat", "grounding")  # that read an answer as a box
EXPECTED, PREDICTED = "expected", "predicted"
EDGE = 1.02  # a box may be a little over the side of its picture by rounding
PIXELS = 0.0  # the unit of boxes that measure their picture in its pixels

Size = tuple[int, int]


@dataclass(frozen=True)
class Frame:
    """A box on a picture, in percent of its sides; `kind` is expected or predicted."""

    kind: str
    left: float
    top: float
    width: float
    height: float


def metric_of(run: RunFolder, task: str) -> str:
    """The metric that the run's recipe names for a task; "" where it names none."""
    tasks = run.config.get("data", {}).get("tasks") or []
    return str(next((one.get("metric") for one in tasks if one.get("name") == task), None) or "")


def unit_of(answers: Iterable[str], shown: Sequence[tuple[Box, Size]]) -> float | None:
    """What a side of a picture measures in a task's boxes: 1, 100, 1000, or `PIXELS`; None where it cannot be told.

    `answers` are all true answers of the task, `shown` true boxes with the sizes (width, height in pixels) of their
    pictures. Files do not name the unit, so it is taken from the largest coordinate and from whether the boxes lie on
    their pictures.
    """
    sides = [max(box) for box in map(parse_box, answers) if box is not None] + [max(box) for box, _ in shown]
    if not sides:
        return None
    largest = max(sides)
    if largest <= EDGE:
        return 1.0
    on_picture = bool(shown) and all(box[2] <= EDGE * size[0] and box[3] <= EDGE * size[1] for box, size in shown)
    # Boxes of large pictures in pixels do not all end before the hundredth.
    if on_picture and (largest > 100 or max(max(size) for _, size in shown) <= 100):
        return PIXELS
    return next((unit for unit in (100.0, 1000.0) if largest <= unit), None)


def frames(answer: str, meta: Mapping[str, Any], prediction: str, size: Size, unit: float | None) -> list[Frame]:
    """The boxes of a sample whose picture has this size, by the unit of its task; one that is not on it is left out."""
    found = {EXPECTED: true_box(answer, dict(meta)), PREDICTED: parse_box(prediction)}
    return [frame for kind, box in found.items() if (frame := frame_of(kind, box, size, unit)) is not None]


def frame_of(kind: str, box: Box | None, size: Size, unit: float | None) -> Frame | None:
    """A box as part of the picture; None for one that is not on it, and where the unit is not known."""
    if box is None or unit is None or min(box) < 0 or min(size) <= 0:
        return None
    wide, high = size if unit == PIXELS else (unit, unit)
    sides = (box[0] / wide, box[1] / high, box[2] / wide, box[3] / high)
    if max(sides) > EDGE:
        return None
    left, top, right, bottom = (round(100 * min(1.0, side), 2) for side in sides)
    return Frame(kind, left, top, round(right - left, 2), round(bottom - top, 2))
