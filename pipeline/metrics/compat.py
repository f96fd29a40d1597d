"""The scores of CoIN's published scripts, faults included: what published numbers are comparable with.

ModalPrompt's repository scores with the same logic (docs/design.md 4.10 and 6.1). Recipes choose these with
`data.scoring: compat`. Predictions arrive stripped of outer white space, because the scripts that generate them strip
them too.
"""

from typing import Any

from pipeline.metrics.boxes import IOU_THRESHOLD, box_iou, true_box
from pipeline.metrics.letters import choices, first_letter, true_letter

Meta = dict[str, Any]

UNANSWERABLE = "Unanswerable"


def scienceqa(prediction: str, answer: str, meta: Meta) -> float:
    """Letter as CoIN reads it: the text itself, "X. ...", else the first single-character word - "The answer is X" is
    no rule of its own, so "A force acts. The answer is C." chooses A."""
    letter = first_letter(prediction, choices(meta))
    return float(letter is not None and letter == true_letter(answer, meta))


def imagenet(prediction: str, answer: str, meta: Meta) -> float:
    """Substring either way; an empty answer is part of every text and counts as right (docs/design.md 4.10, F3)."""
    return float(answer in prediction or prediction in answer)


def gqa(prediction: str, answer: str, meta: Meta) -> float:
    """The prediction in lower case without final full stops equals the answer as it is written."""
    return float(prediction.rstrip(".").lower().removeprefix(" ") == answer)


def single_answer(prediction: str, answer: str, meta: Meta) -> float:
    """Equal in upper case; a final full stop makes it wrong. CoIN's VizWiz and VQAv2."""
    return float(prediction.upper() == answer.upper())


def ocrvqa(prediction: str, answer: str, meta: Meta) -> float:
    """Equal in lower case; a prediction with "Unanswerable" in it counts as wrong, even where that is the answer.

    Source: docs/design.md 4.10, F4.
    """
    return float(UNANSWERABLE not in prediction and prediction.lower() == answer.lower())


def grounding(prediction: str, answer: str, meta: Meta) -> float:
    """IoU > 0.5, after brackets and then the first and last character are cut off: "0.78]" is read as 0.7.

    Source: docs/design.md 4.10, F2.
    """
    text = prediction.removeprefix(" ").replace("[", "").replace("]", "")[1:-1]
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        return 0.0
    wanted = true_box(answer, meta)
    if len(numbers) != 4 or wanted is None:
        return 0.0
    return float(box_iou((numbers[0], numbers[1], numbers[2], numbers[3]), wanted) > IOU_THRESHOLD)
