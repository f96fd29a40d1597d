"""The thread that owns the model: takes waiting requests into the running batch and hands out their tokens."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.answering import Answerer, Question
from pipeline.errors import UserError
from pipeline.serve.decoder import Running, RunningBatch

logger = logging.getLogger("pipeline.serve")


class FullError(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Update:
    """What a request is told: the answer so far, and at its end why it ended; or what was wrong with it."""

    text: str = ""
    finish: str | None = None  # "stop", "length", "refused" (error is the user's to mend) or "failed"
    error: str | None = None
    selected: list[str] = field(default_factory=list)
    similarity: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(eq=False)
class Request:
    """One question with who wants to hear of its answer; `tell` is called from the model's thread."""

    question: Question
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
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that are not in the batch yet."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Put a request into the queue; FullError when it is full."""
        with self._changed:
            if len(self._waiting) >= self.queue:
                raise FullError
            self._waiting.append(request)
            self._changed.notify()

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
                left = [*self._waiting, *(row.key for row in self.running.rows)]
                self._waiting.clear()
            for request in left:
                request.tell(Update(finish="failed", error="the server is stopping; ask again later."))

    def _turn(self, joining: list[Request]) -> None:
        """One step of the batch, and the beginning of those that join it."""
        self.running.drop({row.key for row in self.running.rows if row.key.cancelled})
        try:
            if self.running.rows:
                self._tell(self.running.step())
            self._join([request for request in joining if not request.cancelled])
        except Exception as error:  # a bug must not end the service for everybody to come
            logger.exception("a batch failed")
            failed = {row.key for row in self.running.rows} | set(joining)
            self.running = RunningBatch(self.answerer)
            for request in failed:
                request.tell(Update(finish="failed", error=f"the model failed ({type(error).__name__})."))
            time.sleep(0.1)

    def _join(self, requests: list[Request]) -> None:
        """Begin requests together; if one of them is wrong, each alone, so that it spoils no other."""
        if not requests:
            return
        try:
            routed = self.answerer.route([request.question for request in requests])
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
