"""Boxes on the pictures of examples and of the chat, for tasks that are scored by their box."""

from __future__ import annotations

from pipeline.data.image_limits import plan_image
from pipeline.data.pictures import read_header
from pipeline.data.sample import Sample
from pipeline.errors import UserError
from pipeline.metrics.boxes import parse_box, true_box
from pipeline.report import boxes
from pipeline.report.boxes import METRICS, PIXELS, PREDICTED, Frame, Size, frame_of, metric_of
from pipeline.runs.folder import RunFolder
from pipeline.ui.pictures import LIMITS, Samples

LOOKED_AT = 64  # test samples that a task's unit is taken from


def unit_of(samples: Samples, run: RunFolder, task: str) -> float | None:
    """`report.boxes.unit_of` the expected boxes of a task's first test samples; None where boxes cannot be drawn."""
    split = samples.split(run, task) if metric_of(run, task) in METRICS else None
    if split is None:
        return None
    places = range(min(LOOKED_AT, len(split)))
    try:
        texts = [split.text(place) for place in places]
    except (UserError, OSError):
        return None
    found = [(true_box(text.answer, text.meta), split.sizes[place]) for place, text in enumerate(texts)]
    return boxes.unit_of((), [(box, (int(size[0]), int(size[1]))) for box, size in found if box and min(size) > 0])


def frames(unit: float | None, sample: Sample | None, answer: str) -> list[Frame]:
    """The boxes to draw on a sample's picture: the expected one and the answered one, where they are on it."""
    if unit is None or sample is None or sample.image is None:
        return []
    return boxes.frames(sample.answer, sample.meta, answer, _size(sample.image, unit), unit)


def answered_frames(unit: float | None, picture: bytes, answer: str) -> list[Frame]:
    """The box in an answer to a question about a picture, where the answer is one."""
    frame = None if unit is None else frame_of(PREDICTED, parse_box(answer), _size(picture, unit), unit)
    return [] if frame is None else [frame]


def _size(encoded: bytes, unit: float) -> Size:
    """Width and height of the upright picture where the unit is the pixel; zeros where it cannot be read."""
    if unit != PIXELS:
        return 1, 1  # of no consequence, and the picture need not be read
    try:
        plan_image(encoded, LIMITS)
        header = read_header(encoded)
    except (UserError, OSError):
        return 0, 0
    return header.width, header.height
