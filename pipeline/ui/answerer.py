"""The process that answers the questions of the chat: it loads a run's models and answers what it is sent, in order.

`python -m pipeline.ui.answerer DESCRIPTOR RUN`, started by `pipeline.ui.answering`, with the descriptor of its pipe. A
process of its own keeps torch and the models out of the page's server, and its memory is free when it ends.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.adapter.answering import Answerer
from pipeline.adapter.choosing import Question
from pipeline.adapter.load import load_adapter
from pipeline.errors import UserError, for_user
from pipeline.ui.answering import ANSWER, FAILED, LOADED, REFUSED


def serve(path: str, pipe: Connection) -> None:
    """Load the run at `path`, reply LOADED or FAILED with a sentence, then answer until the pipe closes.

    A question is (text, encoded image or None, task or None); its reply is ANSWER with the answer or REFUSED with a
    sentence. An error that is a bug is raised, and ends the process.
    """
    try:
        answerer = load_adapter(Path(path))
    except Exception as error:
        shown = for_user(error)
        if shown is None:
            raise
        pipe.send((FAILED, str(shown)))
        return
    pipe.send((LOADED, ""))
    while True:
        try:
            text, image, task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((ANSWER, answered(answerer, text, image, task)))
        except UserError as error:
            pipe.send((REFUSED, str(error)))


def answered(answerer: Answerer, text: str, image: bytes | None, task: str | None) -> dict[str, Any]:
    """The answer to a question as a JSON object; `task` is told, or its set is made the first one."""
    if task is not None and not answerer.method.needs_task:
        answer = answerer.answer_told(Question(text, image), task)
    else:
        answer = answerer.answer([Question(text, image, task)])[0]
    return {"answer": answer.text, **answer.to_json()}


if __name__ == "__main__":
    serve(sys.argv[2], Connection(int(sys.argv[1])))
