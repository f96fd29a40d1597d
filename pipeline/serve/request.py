"""A request in the service, and the updates that its client gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.adapter.answer import Chosen
from pipeline.adapter.answering import Question, Tokenised
from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Update:
    """The state of a request's answer: its text so far, and at the end the reason why it ended, or an error."""

    text: str = ""
    # "stop", "length", "refused" (an error of the client), "too_large", "failed" or "stopped"
    finish: str | None = None
    error: str | None = None
    chosen: Chosen = field(default_factory=Chosen)
    prompt_tokens: int = 0
    completion_tokens: int = 0


STOPPING = Update(finish="stopped", error="the server is stopping; ask again later.")
STOPPED = Update(finish="stopped", error="the model has stopped after a failure; the server has to be started again.")
TOO_LARGE = Update(
    finish="too_large",
    error="the question and its answer alone take more memory than there is for answers; ask for fewer tokens, or with "
    "a smaller image.",
)


class FullError(PipelineError):
    """The queue is full."""


class StoppedError(PipelineError):
    """The worker has ended; the message says why."""


@dataclass(eq=False)
class Request:
    """One question and the callback for its updates; `tell` is called from the model's thread.

    A question that is not tokenised yet is tokenised in that thread. Once the answer has begun, `question` is None.
    Where the answer is not `followed`, only its first and its last token are told, and the text only with the last.
    """

    question: Question | Tokenised | None
    longest: int
    tell: Callable[[Update], None]
    stops: tuple[str, ...] = ()
    followed: bool = True
    cancelled: bool = False
    chosen: Chosen = field(default_factory=Chosen)
