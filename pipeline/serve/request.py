"""A question on its way through the service, and what whoever asked it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.adapter.answering import Question, Tokenised
from pipeline.errors import PipelineError


@dataclass(frozen=True)
class Update:
    """What a request is told: the answer so far, and at its end why it ended; or what was wrong with it."""

    text: str = ""
    # "stop", "length", "refused" (error is the user's to mend), "too_large", "failed" or "stopped"
    finish: str | None = None
    error: str | None = None
    selected: list[str] = field(default_factory=list)
    similarity: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] | None = None  # of the selected sets; None: each counts in full
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
    """As many requests wait as may."""


class StoppedError(PipelineError):
    """Nothing is answered any more; the message says why."""


@dataclass(eq=False)
class Request:
    """One question with who wants to hear of its answer; `tell` is called from the model's thread.

    A question that is not tokenised yet is tokenised there too. Once the answer has begun, `question` is None.
    """

    question: Question | Tokenised | None
    longest: int
    tell: Callable[[Update], None]
    stops: tuple[str, ...] = ()
    cancelled: bool = False
    selected: list[str] = field(default_factory=list)
    similarity: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] | None = None
