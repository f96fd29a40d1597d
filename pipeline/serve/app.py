"""The web application of the own engine: chat requests are answered by a worker in this process."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from pipeline.adapter.answering import Tokenised
from pipeline.data.image_limits import WORK_SIDE
from pipeline.serve.admission import Share, unless_gone
from pipeline.serve.chat import ChatRequest, read_chat
from pipeline.serve.completion import completion
from pipeline.serve.refusal import RefusedError
from pipeline.serve.reply import EventStream, Reply
from pipeline.serve.request import FullError, StoppedError, Update
from pipeline.serve.web import Settings, WebService, smaller_picture
from pipeline.serve.worker import Worker


class Service(WebService):
    """The endpoints of one worker."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        answerer, limits = worker.answerer, settings.limits
        if answerer.lmm.conversation.padded:  # images are padded to squares, so the longer side counts
            limits = replace(limits, image=replace(limits.image, side=WORK_SIDE))
        super().__init__(answerer.source, settings, limits)
        self.worker = worker

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await asyncio.to_thread(self.worker.close)

    async def chat(self, http: HttpRequest) -> Response:
        asked = list[ChatRequest]()
        done = self.ending(http, asked)
        try:
            self.authorise(http)
            reply = await self._begin(http, asked)
            if reply.stream:
                return EventStream(reply, done)
            with reply:
                update = await unless_gone(http, reply.last())
        except (RefusedError, FullError, StoppedError) as error:
            refused = self._refused(error)
            done(refused.status, Update(), refused.code)
            raise refused from None
        done(200, update)
        return JSONResponse(completion(reply.identity, reply.model, update, reply.ignored))

    async def ailing(self) -> str:
        return "" if self.worker.alive else "the model has stopped"

    async def metrics_text(self) -> str:
        worker = self.worker
        gauges = {"running": len(worker.running.rows), "waiting": worker.waiting, "largest_batch": worker.largest}
        space = worker.running.space
        gauges |= {"cache_bytes": space.nbytes, "cache_peak_bytes": space.peak}
        counters = {"tokens_total": worker.tokens, "steps_total": worker.batches}
        return self.metrics.text(gauges, counters)

    async def _begin(self, http: HttpRequest, known: list[ChatRequest]) -> Reply:
        """Read and submit a request, and wait for its first token; appends the parsed request to `known`.

        Raises RefusedError, FullError and StoppedError.
        """
        self.worker.check()  # before the body is read in vain
        with Share(self.budget) as share:
            asked, question = await self.read(http, share, self._tokenised)
            share.hold(question.nbytes)
            known.append(asked)
            reply = Reply(self.worker, asked, question)
            # A stream's status is sent with its first event, so wait until it is known whether there is an answer.
            try:
                await unless_gone(http, reply.begun())
            except BaseException:
                reply.cancel()
                raise
            return reply

    def _tokenised(self, body: bytearray) -> tuple[ChatRequest, Tokenised]:
        """Parse and tokenise a request; raises UserError, of which RefusedError has the status."""
        answerer = self.worker.answerer
        asked, question = read_chat(body, self.offer, self.limits)
        del body  # as long as the image, which is in `question` from here on
        if asked.image is not None:
            answerer.require_fitting(question, asked.image.smaller)
        with self.decoding.hold(asked.image.nbytes if asked.image else 0):
            return asked, answerer.tokenise(question, picture=smaller_picture(question.image, asked.image))

    def _refused(self, error: RefusedError | FullError | StoppedError) -> RefusedError:
        if isinstance(error, FullError):
            message = f"{self.worker.queue} requests wait already; ask again in a second."
            return RefusedError(message, 429, "rate_limit_exceeded")
        return RefusedError(str(error), 503, "server_error") if isinstance(error, StoppedError) else error
