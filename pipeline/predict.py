"""One answer to one question, routed like a test sample."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.adapter import source_of
from pipeline.answering import Answerer, Question, read_picture


def predict(run: Path, image: Path | None, question: str, task: str | None = None) -> dict[str, Any]:
    """Return {answer, sets (for people), selected, similarity} for a question about an image file, or about none.

    `run` is the folder of a run or an adapter; `task` is for methods that have to be told the task. Raises UserError
    for a run without finished stages, an image that cannot be read, or a missing or unknown task.
    """
    encoded = read_picture(image, "--image: ")
    source = source_of(run)
    source.task_number(task)  # said before the model is loaded
    answer = Answerer(source).answer([Question(question, encoded, task)])[0]
    return {
        "answer": answer.text, "sets": answer.sets, "selected": answer.selected, "similarity": answer.similarity
    }  # fmt: skip
