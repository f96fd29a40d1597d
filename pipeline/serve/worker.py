"""The thread that runs the model: moves queued requests into the running batch and reports their tokens."""

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
# Most requests that join at one step: the answers in progress wait until their prompts are read.
JOINING = 32
JOINING_ON_CPU = 8  # more prompts at once are read no faster per prompt there: their activations leave the caches
SLOTS = 32  # rows for whose keys and values memory is allocated at once


class Worker:
    """Answers requests by continuous batching on a thread of its own.

    If memory runs out in spite of admission control, half of the batch continues and the other half is parked in host
    memory.

    Args:
        answerer: the loaded adapter.
        batch: most rows decoded together.
        queue: most requests that wait.
        memory: most bytes of keys and values; None: what the device has (see `KeyValueMemory`).
    """

    def __init__(self, answerer: Answerer, batch: int, queue: int, memory: int | None = None) -> None:
        self.answerer = answerer
        self.batch, self.queue = batch, queue
        self.running = RunningBatch(answerer, min(batch, SLOTS))
        self.tokens = 0  # generated so far
        self.batches = 0  # steps of the model so far
        self.largest = 0  # most rows in one step
        self.memory = KeyValueMemory(answerer.lmm, memory)
        self._parked: deque[Parked[Running]] = deque()
        # The number of rows at which the next one did not fit: no request joins before a row has left.
        self._most_rows: int | None = None
        self._waiting: deque[Request] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._ended: Update | None = None  # sent to every request once the worker has ended
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start answering."""
        self._thread.start()

    def close(self, wait_s: float = 10.0) -> None:
        """Stop after the current decoding step and notify all open requests."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(wait_s)

    @property
    def alive(self) -> bool:
        """Whether the worker answers requests."""
        return self._ended is None and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of requests in the queue."""
        return len(self._waiting)

    def check(self) -> None:
        """Raise what `submit` would: FullError when the queue is full, StoppedError when the worker has ended."""
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
        """Cancel a request: it leaves the queue at once, or the batch before the next decoding step."""
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
        """The rows in the batch, and the parked ones."""
        return [*self.running.rows, *(row for parked in self._parked for row in parked.rows)]

    def _chosen(self) -> list[Request]:
        """Dequeue the requests that join now, in order, as far as rows and memory are free."""
        rows = self.running.rows
        if self._parked or (self._most_rows is not None and len(rows) >= self._most_rows):
            return []
        self._most_rows = None
        together = JOINING if self.memory.device.type == "cuda" else min(JOINING, JOINING_ON_CPU)
        most = min(together, self.batch - len(rows), len(self._waiting))
        asked = [self._extent(self._waiting[place]) for place in range(most)]
        extents = [row.extent for row in rows]
        number = self.memory.admitted(extents, asked, self.running.nbytes)
        if number == 0 and asked and not rows and self.running.nbytes:
            self.running.release()  # the memory that earlier rows needed may be too much beside this one's prompt
            number = self.memory.admitted(extents, asked, 0)
        if number == 0 and asked and not rows:
            # It does not fit even alone: refuse it now instead of failing an allocation in the middle of its answer.
            self._waiting.popleft().tell(TOO_LARGE)
        self.running.space.most = self.memory.most(asked[:number], self.running.nbytes)
        return [self._waiting.popleft() for _ in range(number)]

    def _extent(self, request: Request) -> Extent:
        """Tokens of a request, with the most prompt sets that it may get."""
        question, pool = request.question, self.answerer.pool
        prompt = len(question.example.prompt) if isinstance(question, Tokenised) else 0
        sets = self.answerer.method.routing.rule.most(len(pool))
        return Extent(prompt + sets * self.answerer.entry.length(pool.tensors), request.longest)

    def _turn(self, joining: list[Request]) -> None:
        """Decode one token for every row, then add the rows of joining requests."""
        try:
            self._drop_cancelled()
            if self.running.rows:
                self._step()
            self._resume()
            self._join([request for request in joining if not request.cancelled])
        except Exception as error:  # an unexpected error fails the open requests, not the service
            logger.exception("a batch failed")
            failed = {row.key for row in self._rows()} | set(joining)
            with self._changed:  # some may be queued again, because memory ran out
                failed -= set(self._waiting)
            for request in failed:
                request.tell(Update(finish="failed", error=f"the model failed ({type(error).__name__})."))
            self._parked.clear()
            # If this fails too, as on a lost GPU, the thread ends and no further requests are accepted.
            self.running = RunningBatch(self.answerer, min(self.batch, SLOTS))
            time.sleep(0.1)

    def _drop_cancelled(self) -> None:
        self.running.drop({row.key for row in self.running.rows if row.key.cancelled})
        left = (parked for parked in self._parked if not all(row.key.cancelled for row in parked.rows))
        self._parked = deque(left)

    def _step(self) -> None:
        """Decode one token for every row; whenever memory runs out, park half of the rows and retry."""
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
        """Bring parked rows back once there is memory for them."""
        while self._parked:
            parked = self._parked[0]
            running = [row.extent for row in self.running.rows]
            wanted = [row.extent for row in parked.rows]
            if running and self.memory.admitted(running, wanted, self.running.nbytes) < len(wanted):
                return
            self.running.space.most = self.memory.most(wanted, self.running.nbytes)
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
        self.running.space.slots = 0  # from now on only what the batch needs is allocated
        logger.warning(
            "memory ran out with %d answers in progress (%.2f GiB of keys and values); fewer are now decoded together",
            rows,
            self.running.nbytes / GIB,
        )

    def _join(self, requests: list[Request]) -> None:
        """Add requests to the batch together; if one is invalid, one at a time, so that the others are unaffected.

        If memory runs out, half of them at a time. A single one without memory waits until rows leave.
        """
        if not requests:
            return
        try:
            routed = self.answerer.route([request.question for request in requests if request.question is not None])
            for number in range(len(requests)):  # tokenises each question and raises for one that is too long
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
            request.chosen = self.answerer.chosen(routed, number)
        began = [Running(request, request.longest, request.stops, request.followed) for request in requests]
        try:
            self.running.begin(routed, began)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._join_fewer(requests)
            return
        for request in requests:
            request.question = None  # frees its pixels
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
            if not (request.followed or row.finish or len(row.tokens) == 1):
                continue  # nobody reads it, and every message wakes the event loop's thread
            request.tell(Update(row.text, row.finish, None, request.chosen, row.prompt_tokens, len(row.tokens)))
