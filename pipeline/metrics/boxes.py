"""Scores of a predicted bounding box: read it from the answer, compare it with the true one."""

import re
from typing import Any

Box = tuple[float, float, float, float]

IOU_THRESHOLD = 0.5
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def iou(prediction: str, answer: str, meta: dict[str, Any]) -> float:
    """1 when the predicted box covers the true one with an intersection over union of at least 0.5; unreadable = 0."""
    covered = _covered(prediction, answer, meta)
    return float(covered is not None and covered >= IOU_THRESHOLD)


def grounding(prediction: str, answer: str, meta: dict[str, Any]) -> float:
    """1 when the intersection over union is more than 0.5; unreadable = 0.

    For CoIN's Grounding: RefCOCO, RefCOCO+ and RefCOCOg (docs/design.md 6.1), without the script's fault of losing
    digits (docs/design.md 4.10, F2).
    """
    covered = _covered(prediction, answer, meta)
    return float(covered is not None and covered > IOU_THRESHOLD)


def parse_box(text: str) -> Box | None:
    """Read (x1, y1, x2, y2) from a text that holds exactly four numbers, corners in either order; otherwise None."""
    numbers = [float(number) for number in _NUMBER.findall(text)]
    if len(numbers) != 4:
        return None
    x1, y1, x2, y2 = numbers
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def true_box(answer: str, meta: dict[str, Any]) -> Box | None:
    """The box of a sample: its `answer_bbox` (text or list of numbers) where it has one, else its answer."""
    box = meta.get("answer_bbox", answer)
    return parse_box(box if isinstance(box, str) else " ".join(str(number) for number in box))


def box_iou(first: Box, second: Box) -> float:
    """Return the intersection over union of two boxes (x1, y1, x2, y2); 0 when neither has an area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    union = sum(areas) - common
    return common / union if union > 0 else 0.0


def _covered(prediction: str, answer: str, meta: dict[str, Any]) -> float | None:
    found, wanted = parse_box(prediction), true_box(answer, meta)
    return None if found is None or wanted is None else box_iou(found, wanted)
