"""The web application in front of an engine: routes, chooses the prompt sets, and passes requests and replies on."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from pipeline.adapter.choosing import Chooser, Routable
from pipeline.serve.admission import Share, unless_gone
from pipeline.serve.chat import ChatRequest
from pipeline.serve.front.engine import Engine
from pipeline.serve.front.passing import Passed, PassedStream
from pipeline.serve.front.request import Forwarded, read_forwarded
from pipeline.serve.front.selector import Selector
from pipeline.serve.refusal import RefusedError
from pipeline.serve.request import Update
from pipeline.serve.web import Settings, WebService, smaller_picture


class Front(WebService):
    """The endpoints of an engine's model with prompt sets that are chosen here.

    Args:
        chooser: routing of the prompt sets.
        engine: what answers.
        settings: of the service.
        most: most requests in progress, those that wait in the engine included; further ones are refused.
    """

    def __init__(self, chooser: Chooser, engine: Engine, settings: Settings, most: int) -> None:
        super().__init__(chooser.source, settings, settings.limits)
        self.selector, self.engine = Selector(chooser), engine
        self.most, self.open = most, 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.engine.connected():
            yield
        self.selector.close()

    async def chat(self, http: HttpRequest) -> Response:
        asked = list[ChatRequest]()
        done = self.ending(http, asked)
        try:
            async with contextlib.AsyncExitStack() as held:
                self.authorise(http)
                held.enter_context(self._place())
                passed = await self._begin(http, asked)
                held.push_async_callback(passed.response.aclose)
                if asked[0].stream:
                    return PassedStream(passed, held.pop_all(), done)
                content, update = await unless_gone(http, passed.whole())
        except RefusedError as error:
            done(error.status, Update(), error.code)
            raise
        done(200, update)
        return JSONResponse(content)

    async def ailing(self) -> str:
        return await self.engine.ailing()

    async def metrics_text(self) -> str:
        engine = await self.engine.metrics_text()
        return self.metrics.text({"running": self.open, "engine_up": int(bool(engine))}, {}) + engine

    @contextlib.contextmanager
    def _place(self) -> Iterator[None]:
        """A place among the requests in progress; RefusedError (429) where there is none."""
        if self.open >= self.most:
            message = f"{self.open} requests are in progress; ask again in a second."
            raise RefusedError(message, 429, "rate_limit_exceeded")
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1

    async def _begin(self, http: HttpRequest, known: list[ChatRequest]) -> Passed:
        """Read a request, choose its sets and ask the engine; appends the parsed request to `known`.

        Raises RefusedError.
        """
        with Share(self.budget) as share:
            forwarded, question = await self.read(http, share, self._routable)
            known.append(forwarded.asked)
            share.hold(forwarded.nbytes + question.nbytes)
            model = await unless_gone(http, self.engine.model())
            chosen = await unless_gone(http, self.selector.choose(question))
            body = forwarded.written(model, chosen, self.engine.behind.identity)
            share.hold(len(body))
            del forwarded, question
            response = await unless_gone(http, self.engine.ask(body))
        return Passed(self.engine, response, self.settings.model, chosen, known[0].ignored)

    def _routable(self, body: bytearray) -> tuple[Forwarded, Routable]:
        """Parse a request and prepare it for routing; raises UserError, of which RefusedError has the status."""
        forwarded = read_forwarded(body, self.offer, self.limits)
        plan, question = forwarded.asked.image, forwarded.question
        with self.decoding.hold(plan.nbytes if plan else 0):
            return forwarded, self.selector.chooser.read(question, picture=smaller_picture(question.image, plan))
