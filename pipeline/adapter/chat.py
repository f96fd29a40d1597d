"""An interactive session on a terminal: questions about an image that can be changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.adapter.answering import Answerer, read_picture
from pipeline.errors import UserError
from pipeline.files.paths import expanded

HELP = "/image FILE (or /image alone for none), /task NAME, /quit; anything else is a question"


def chat(answerer: Answerer, image: Path | None, read: Callable[[str], str], show: Callable[[str], None]) -> int:
    """Answer what `read` returns until it raises EOFError or says /quit; returns the number of questions answered.

    An invalid picture or task is reported and changes nothing. Raises UserError for an invalid first picture.
    """
    encoded, task, answered = read_picture(image), None, 0
    show(HELP)
    while True:
        try:
            line = read(f"[{image.name if image else 'no image'}] > ").strip()
        except (EOFError, KeyboardInterrupt):
            return answered
        command, _, rest = line.partition(" ")
        try:
            if command in ("/quit", "/exit"):
                return answered
            if command == "/image":
                chosen = Path(expanded(rest.strip())) if rest.strip() else None
                encoded, image = read_picture(chosen), chosen
            elif command == "/task":
                answerer.source.task_number(rest.strip())
                task = rest.strip()
            elif command.startswith("/"):
                show(HELP)
            elif line:
                answer = answerer.ask(line, encoded, task)
                strange = "; the question resembles no task" if answer.unfamiliar else ""
                show(f"{answer.text}    (prompt sets: {answer.sets}{strange})")
                answered += 1
        except UserError as error:
            show(f"error: {error}")
