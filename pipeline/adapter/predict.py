"""`predict`: answers one question, routed like a test sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.adapter.answering import Answerer, Question, read_picture
from pipeline.adapter.load import source_of
from pipeline.config.unfamiliar import Unfamiliar
from pipeline.errors import UserError
from pipeline.ranks.collector import collector_paused

UNFAMILIAR = (
    "the question resembles no task: it is farther from the training samples of the task that fits best than 99 in 100 "
    "of these are"
)


def predict(
    run: Path,
    image: Path | None,
    question: str,
    task: str | None = None,
    model: str | None = None,
    clip: str | None = None,
    unfamiliar: Unfamiliar | None = None,
) -> dict[str, Any]:
    """Return {answer, sets (in words), selected, similarity} for a question, and what else `Chosen` knows; of
    one that resembles no task a `note` says so.

    Args:
        run: folder of a run or an adapter.
        image: image file, None for a question without an image.
        question: the question.
        task: the task, for methods that need it.
        model: location of the frozen model on this machine, None: as recorded.
        clip: the same for the CLIP.
        unfamiliar: what becomes of a question that resembles no task, None: as the run's method says.

    Raises UserError for an empty question, a run without finished stages, an unreadable image, a missing or unknown
    task, other models, or sets that cannot tell which questions are unfamiliar.
    """
    if not question.strip():
        raise UserError('--question is empty; expected what to ask, such as --question "what is this?".')
    encoded = read_picture(image, "--image: ")
    source = source_of(run, model, clip).with_unfamiliar(unfamiliar)
    source.task_number(task)  # raises before the model is loaded
    with collector_paused():
        answerer = Answerer(source)
    answer = answerer.answer([Question(question, encoded, task)])[0]
    note = {"note": UNFAMILIAR} if answer.unfamiliar else {}
    return {"answer": answer.text, "sets": answer.sets, **answer.to_json(), **note}
