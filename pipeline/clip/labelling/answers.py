"""The answers of a person to one question of a run, each written to ask.csv as soon as it is given."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from pipeline.clip.active.ask_files import Question, picture_path, read_answers, write_answers
from pipeline.clip.recipe_data import NONE_OF_THESE
from pipeline.errors import PipelineError, UserError


class OtherQuestion(PipelineError):
    """The run asks for something else by now, or for nothing."""


class Answers:
    """The state of ask.csv in a run folder, read anew for every request, so that an edit of the file is seen.

    Methods raise UserError for a file that cannot be used.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._writing = threading.Lock()

    def state(self) -> dict[str, Any] | None:
        """The question and the answers so far; None where the run asks for nothing."""
        question = Question.read(self.run)
        if question is None:
            return None
        return {
            "question": question.identity,
            "unit": question.unit,
            "round": question.round,
            "rounds": question.rounds,
            "classes": list(question.classes),
            "none": NONE_OF_THESE,
            "images": list(question.images),
            "answers": read_answers(self.run, question),
        }

    def answer(self, identity: str, number: int, label: str | None) -> None:
        """Write the class of the image with this number, from 1; None takes an answer back.

        Raises OtherQuestion where the run does not ask the question of this identity, and UserError for an unknown
        number or class.
        """
        with self._writing:
            question = Question.read(self.run)
            if question is None or question.identity != identity:
                raise OtherQuestion("the run asks for other images by now")
            if not 1 <= number <= len(question.images):
                raise UserError(f"there is no image {number}; expected 1 to {len(question.images)}")
            if label is not None and label not in (*question.classes, NONE_OF_THESE):
                raise UserError(f"there is no class '{label}'")
            found = read_answers(self.run, question)
            found[number - 1] = label
            write_answers(self.run, question, found)

    def waiting(self) -> int:
        """How many images have no answer yet; 0 where the run asks for nothing."""
        state = self.state()
        return 0 if state is None else state["answers"].count(None)

    def picture(self, identity: str, number: int) -> Path | None:
        """The picture of the image with this number of the present question; None where there is none."""
        question = Question.read(self.run)
        if question is None or question.identity != identity or not 1 <= number <= len(question.images):
            return None
        return picture_path(self.run, number)
