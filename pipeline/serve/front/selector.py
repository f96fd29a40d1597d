"""Chooses the sets of requests that arrive at the same time together, on one thread."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.adapter.answer import Chosen
from pipeline.adapter.choosing import Chooser, Routable
from pipeline.errors import UserError
from pipeline.serve.refusal import RefusedError

logger = logging.getLogger("pipeline.serve")
TOGETHER = 32  # most questions whose keys are computed in one batch


class Selector:
    """Batches routing: while one batch is computed, the questions that arrive wait and form the next one."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="route")
        self._waiting: list[tuple[Routable, asyncio.Future[Chosen]]] = []
        self._working: asyncio.Future[None] | None = None

    async def choose(self, question: Routable) -> Chosen:
        """The sets of a question; raises RefusedError where routing fails."""
        future: asyncio.Future[Chosen] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, future))
        if self._working is None:
            self._working = asyncio.ensure_future(self._work())
        return await future

    def close(self) -> None:
        """End the thread after its batch."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
                batch = [(question, future) for question, future in batch if not future.done()]  # whose client left
                questions = [question for question, _ in batch]
                results = await asyncio.get_running_loop().run_in_executor(self._thread, self._results, questions)
                for (_, future), result in zip(batch, results, strict=True):
                    if future.done():
                        continue
                    if isinstance(result, RefusedError):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
        finally:
            self._working = None

    def _results(self, questions: Sequence[Routable]) -> list[Chosen | RefusedError]:
        """The sets of each question, or why it has none; if a batch fails, its questions are routed one by one."""
        try:
            routed = self.chooser.route(questions) if questions else None
        except Exception as error:
            if len(questions) > 1:
                return [result for question in questions for result in self._results([question])]
            if isinstance(error, UserError):
                return [RefusedError(str(error))]
            logger.exception("a request failed")
            return [RefusedError(f"the request failed ({type(error).__name__}).", 500, "server_error")]
        return [] if routed is None else [self.chooser.chosen(routed, number) for number in range(len(questions))]
