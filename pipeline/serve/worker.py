"""The thread that owns the model: takes waiting requests into the running batch and hands out their tokens."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

from pipeline.adapter.answering import Answerer, Tokenised
from pipeline.backbones.decoding import Parked
from pipeline.errors import UserError
from pipeline.serve.decoder import Running, RunningBatch
from pipeline.serve.memory import GIB, Extent, KeyValueMemory, is_out_of_memory
from pipeline.serve.request import STOPPED, STOPPING, TOO_LARGE, FullError, Request, StoppedError, Update

logger = logging.getLogger("pipeline.serve")


class Worker:
    """Answers requests in batches of at most `batch`, and of as many as there is memory for; at most `queue` wait.

    `memory` is the most bytes for keys and values, None: what the device has (see `KeyValueMemory`). Where memory runs
    out all the same, half of the batch goes on and the other half waits in the host's memory.
    """

    def __init__(self, answerer: Answerer, batch: int, queue: int, memory: int | None = None) -> None:
        self.answerer = answerer
        self.batch, self.queue = batch, queue
        self.running = RunningBatch(answerer)
        self.tokens = 0  # generated so far
        self.batches = 0  # steps of the model so far
        self.largest = 0  # most rows in one step
        self.memory = KeyValueMemory(answerer.lmm, memory)
        self._parked: deque[Parked[Running]] = deque()
        # Nobody joins while there are so many rows: with these the next one did not fit.
        self._most_rows: int | None = None
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
                    while not (self._waiting or self.running.rows or self._parked or self._closing):
                        self._changed.wait()
                    if self._closing:
                        break
                    joining = self._chosen()
                self._turn(joining)
        finally:
            with self._changed:
                self._ended = STOPPING if self._closing else STOPPED
                left = [*self._waiting, *(row.key for row in self._rows())]
                self._waiting.clear()
            for request in left:
                request.tell(self._ended)

    def _rows(self) -> list[Running]:
        """Those in the batch, and those that wait in the host's memory."""
        return [*self.running.rows, *(row for parked in self._parked for row in parked.rows)]

    def _chosen(self) -> list[Request]:
        """Take those out of the queue that join now: as many as there is place and memory for, in their order."""
        rows = self.running.rows
        if self._parked or (self._most_rows is not None and len(rows) >= self._most_rows):
            return []
        self._most_rows = None
        first = [self._waiting[place] for place in range(min(self.batch - len(rows), len(self._waiting)))]
        asked = [self._extent(one) for one in first]
        number = self.memory.admitted([row.extent for row in rows], asked, self.running.nbytes)
        if number == 0 and first and not rows:
            # It does not fit alone: a sentence at once, rather than a failed allocation in the middle of it.
            self._waiting.popleft().tell(TOO_LARGE)
        return [self._waiting.popleft() for _ in range(number)]

    def _extent(self, request: Request) -> Extent:
        """The tokens that a request will have with as many prompt sets as it may get."""
        question, pool = request.question, self.answerer.pool
        prompt = len(question.example.prompt) if isinstance(question, Tokenised) else 0
        sets = self.answerer.method.routing.rule.most(len(pool))
        return Extent(prompt + sets * (pool.prompts.shape[1] if len(pool) else 0), request.longest)

    def _turn(self, joining: list[Request]) -> None:
        """One step of the batch, and the beginning of those that join it."""
        try:
            self._drop_cancelled()
            if self.running.rows:
                self._step()
            self._resume()
            self._join([request for request in joining if not request.cancelled])
        except Exception as error:  # a bug must not end the service for everybody to come
            logger.exception("a batch failed")
            failed = {row.key for row in self._rows()} | set(joining)
            with self._changed:  # some may wait again, because memory ran out
                failed -= set(self._waiting)
            for request in failed:
                request.tell(Update(finish="failed", error=f"the model failed ({type(error).__name__})."))
            self._parked.clear()
            # Where this fails too, as on a GPU that is lost, the thread ends and no more requests are taken.
            self.running = RunningBatch(self.answerer)
            time.sleep(0.1)

    def _drop_cancelled(self) -> None:
        self.running.drop({row.key for row in self.running.rows if row.key.cancelled})
        left = (parked for parked in self._parked if not all(row.key.cancelled for row in parked.rows))
        self._parked = deque(left)

    def _step(self) -> None:
        """One token for every row; where memory runs out, for the first half of them, and so on down to one."""
        while self.running.rows:
            try:
                self._tell(self.running.step())
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            number = len(self.running.rows)
            self._ran_out(number)
            if number == 1:
                (row,) = self.running.rows
                self.running.drop({row.key})
                row.key.tell(TOO_LARGE)
            else:
                self._parked.appendleft(self.running.park(number // 2))

    def _resume(self) -> None:
        """Take back rows that wait in the host's memory, once there is room for them."""
        while self._parked:
            parked = self._parked[0]
            running = [row.extent for row in self.running.rows]
            wanted = [row.extent for row in parked.rows]
            if running and self.memory.admitted(running, wanted, self.running.nbytes) < len(wanted):
                return
            try:
                self.running.resume(parked)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._ran_out(len(self.running.rows))
                if self.running.rows:
                    return
                if len(parked.rows) == 1:
                    self._parked.popleft().rows[0].key.tell(TOO_LARGE)
                else:
                    self._parked.popleft()
                    self._parked.extendleft(reversed(parked.halves()))
                continue
            self._parked.popleft()

    def _ran_out(self, rows: int) -> None:
        self.memory.ran_out()
        logger.warning(
            "memory ran out with %d answers in progress (%.2f GiB of keys and values); fewer are generated together",
            rows,
            self.running.nbytes / GIB,
        )

    def _join(self, requests: list[Request]) -> None:
        """Begin requests together; if one of them is wrong, each alone, so that it spoils no other.

        Where memory runs out, half of them at a time. One for which there is none waits for rows to leave.
        """
        if not requests:
            return
        try:
            routed = self.answerer.route([request.question for request in requests if request.question is not None])
            for number in range(len(requests)):  # tokenises, and finds questions that are too long
                routed.examples[number]
        except Exception as error:
            if is_out_of_memory(error):
                self._join_fewer(requests)
            elif len(requests) > 1:
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
            request.weights = self.answerer.weights(routed, number)
        began = [Running(request, request.longest, request.stops) for request in requests]
        try:
            self.running.begin(routed, began)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._join_fewer(requests)
            return
        for request in requests:
            request.question = None  # its pixels are not needed any more
        self._tell(began)

    def _join_fewer(self, requests: list[Request]) -> None:
        rows = len(self.running.rows)
        self._ran_out(rows)
        if len(requests) > 1:
            half = len(requests) // 2
            self._join(requests[:half])
            self._join(requests[half:])
        elif rows:
            self._most_rows = rows
            with self._changed:
                self._waiting.appendleft(requests[0])
        else:
            requests[0].tell(TOO_LARGE)

    def _tell(self, rows: list[Running]) -> None:
        self.tokens += len(rows)
        self.batches += 1
        self.largest = max(self.largest, len(rows))
        for row in rows:
            request: Request = row.key
            request.tell(
                Update(
                    row.text,
                    row.finish,
                    None,
                    request.selected,
                    request.similarity,
                    request.weights,
                    row.prompt_tokens,
                    len(row.tokens),
                )
            )
