"""The thread that owns the model: takes waiting requests into the running batch and hands out their tokens."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.answering import Answerer, Question, Tokenised
from pipeline.errors import UserError
from pipeline.serve.decoder import Running, RunningBatch

logger = logging.getLogger("pipeline.serve")


@dataclass(frozen=True)
class Update:
    """What a request is told: the answer so far, and at its end why it ended; or what was wrong with it."""

    text: str = ""
    finish: str | None = None  # "stop", "length", "refused" (error is the user's to mend), "failed" or "stopped"
    error: str | None = None
    selected: list[str] = field(default_factory=list)
    similarity: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0


STOPPING = Update(finish="stopped", error="the server is stopping; ask again later.")
STOPPED = Update(finish="stopped", error="the model has stopped after a failure; the server has to be started again.")


class FullError(Exception):
    """As many requests wait as may."""


class StoppedError(Exception):
    """Nothing is answered any more; the message says why."""


@dataclass(eq=False)
class Request:
    """One question with who wants to hear of its answer; `tell` is called from the model's thread.

    A question that is not tokenised yet is tokenised there too. Once the answer has begun, `question` is None.
    """

    question: Question | Tokenised | None
    longest: int
    tell: Callable[[Update], None]
    cancelled: bool = False
    selected: list[str] = field(default_factory=list)
    similarity: dict[str, float] = field(default_factory=dict)


class Worker:
    """Answers requests in batches of at most `batch`; at most `queue` wait."""

    def __init__(self, answerer: Answerer, batch: int, queue: int) -> None:
        self.answerer = answerer
        self.batch, self.queue = batch, queue
        self.running = RunningBatch(answerer)
        self.tokens = 0  # generated so far
        self.batches = 0  # steps of the model so far
        self.largest = 0  # most rows in one step
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._ended: Update | None = None  # what is told once nothing is answered any more
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start answering."""
        self._thread.start()

    def close(self, wait_s: float = 10.0) -> None:
        """Stop after the token in progress; whoever waits is told so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(wait_s)

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._ended is None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that are not in the batch yet."""
        return len(self._waiting)

    def check(self) -> None:
        """Raise what `submit` would: FullError when the queue is full, StoppedError when nothing is answered."""
        if self._ended is not None:
            raise StoppedError(self._ended.error)
        if len(self._waiting) >= self.queue:
            raise FullError

    def submit(self, request: Request) -> None:
        """Put a request into the queue; raises FullError and StoppedError."""
        with self._changed:
            self.check()
            self._waiting.append(request)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Forget a request: it leaves the queue at once, or the batch with the next token."""
        with self._changed:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    while not self._waiting and not self.running.rows and not self._closing:
                        self._changed.wait()
                    if self._closing:
                        break
                    free = self.batch - len(self.running.rows)
                    joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
                self._turn(joining)
        finally:
            with self._changed:
                self._ended = STOPPING if self._closing else STOPPED
                left = [*self._waiting, *(row.key for row in self.running.rows)]
                self._waiting.clear()
            for request in left:
                request.tell(self._ended)

    def _turn(self, joining: list[Request]) -> None:
        """One step of the batch, and the beginning of those that join it."""
        try:
            self.running.drop({row.key for row in self.running.rows if row.key.cancelled})
            if self.running.rows:
                self._tell(self.running.step())
            self._join([request for request in joining if not request.cancelled])
        except Exception as error:  # a bug must not end the service for everybody to come
            logger.exception("a batch failed")
            failed = {row.key for row in self.running.rows} | set(joining)
            for request in failed:
                request.tell(Update(finish="failed", error=f"the model failed ({type(error).__name__})."))
            # Where this fails too, as on a GPU that is lost, the thread ends and no more requests are taken.
            self.running = RunningBatch(self.answerer)
            time.sleep(0.1)

    def _join(self, requests: list[Request]) -> None:
        """Begin requests together; if one of them is wrong, each alone, so that it spoils no other."""
        if not requests:
            return
        try:
            routed = self.answerer.route([request.question for request in requests if request.question is not None])
            for number in range(len(requests)):  # tokenises, and finds questions that are too long
                routed.examples[number]
        except Exception as error:
            if len(requests) > 1:
                for request in requests:
                    self._join([request])
            elif isinstance(error, UserError):
                requests[0].tell(Update(finish="refused", error=str(error)))
            else:
                logger.exception("a request failed")
                requests[0].tell(Update(finish="failed", error=f"the request failed ({type(error).__name__})."))
            return
        for number, request in enumerate(requests):
            request.selected = self.answerer.set_names(routed, number)
            request.similarity = self.answerer.similarities(routed, number)
        began = [Running(request, request.longest) for request in requests]
        self.running.join(routed, began)
        for request in requests:
            request.question = None  # its pixels are not needed any more
        self._tell(began)

    def _tell(self, rows: list[Running]) -> None:
        self.tokens += len(rows)
        self.batches += 1
        self.largest = max(self.largest, len(rows))
        for row in rows:
            request: Request = row.key
            request.tell(
                Update(
                    row.text, row.finish, None, request.selected, request.similarity, row.prompt_tokens, len(row.tokens)
                )
            )
