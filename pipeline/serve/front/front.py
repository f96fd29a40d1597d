"""The web application in front of an engine: routes, chooses the prompt sets, and passes requests and replies on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pipeline.adapter.choosing import Chooser, Routable
from pipeline.errors import UserError
from pipeline.serve.admission import Share, unless_gone
from pipeline.serve.chat import ChatRequest, Offer
from pipeline.serve.front.engine import Engine
from pipeline.serve.front.passing import Passed, PassedStream
from pipeline.serve.front.request import Forwarded, read_forwarded
from pipeline.serve.front.selector import Selector
from pipeline.serve.front.sets import Sets
from pipeline.serve.refusal import RefusedError
from pipeline.serve.request import Update
from pipeline.serve.web import Settings, WebService, smaller_picture

logger = logging.getLogger("pipeline.serve")


@dataclass(frozen=True)
class Serving:
    """What a request that arrives now gets; requests in progress keep what they began with."""

    sets: Sets
    selector: Selector
    offer: Offer


class Front(WebService):
    """The endpoints of an engine's model with prompt sets that are chosen here.

    Args:
        sets: the prompt sets.
        chooser: their routing.
        engine: what answers.
        settings: of the service.
        most: most requests in progress, those that wait in the engine included; further ones are refused.
        read: reads the sets again, for POST /reload.
    """

    def __init__(
        self, sets: Sets, chooser: Chooser, engine: Engine, settings: Settings, most: int, read: Callable[[], Sets]
    ) -> None:
        super().__init__(chooser.source, settings, settings.limits)
        self.serving = Serving(sets, Selector(chooser), self.offer)
        self.engine, self.most, self.open = engine, most, 0
        self._read_sets, self._reloading = read, asyncio.Lock()

    def further_routes(self) -> list[Route]:
        return [Route("/reload", self.reload, methods=["POST"])]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.engine.connected():
            yield
        self.serving.selector.close()

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

    async def reload(self, http: HttpRequest) -> Response:
        """POST /reload: read the folder of the prompt sets again; the reply names those that are served from now on."""
        self.authorise(http)
        # A body of JSON, here an empty object, is what no web page sends to another origin unasked.
        with Share(self.budget) as share:
            await self.read(http, share, lambda body: None)
        known = self.serving.sets
        if known.form.kind != "parts":
            raise RefusedError(
                "the engine's checkpoint has what was learned; export it anew and start the service anew, or serve "
                "prompt sets with --sets parts.",
                409,
            )
        async with self._reloading:
            try:
                self.serving = await asyncio.get_running_loop().run_in_executor(None, self._again)
            except UserError as error:
                raise RefusedError(f"{error} The prompt sets of before are still served.", 409) from None
            self.source, self.offer = self.serving.sets.source, self.serving.offer
        names = self.source.pool.names
        logger.info("prompt sets: %s", ", ".join(names))
        return JSONResponse({"prompt_sets": names, "added": [n for n in names if n not in known.form.names]})

    def _again(self) -> Serving:
        """What is served once the folder is read again; UserError where its sets need another engine or CLIP."""
        sets = self._read_sets()
        sets.require_models_of(self.serving.sets)
        chooser = self.serving.selector.chooser.of(sets.source)
        return Serving(sets, Selector(chooser), self.offer_of(sets.source))

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
        serving = self.serving
        with Share(self.budget) as share:
            forwarded, question = await self.read(http, share, functools.partial(self._routable, serving))
            known.append(forwarded.asked)
            share.hold(forwarded.nbytes + question.nbytes)
            model = await unless_gone(http, self.engine.model())
            chosen = await unless_gone(http, serving.selector.choose(question))
            body = forwarded.written(model, chosen, serving.sets.form)
            share.hold(len(body))
            del forwarded, question
            response = await unless_gone(http, self.engine.ask(body))
        return Passed(self.engine, response, self.settings.model, chosen, known[0].ignored)

    def _routable(self, serving: Serving, body: bytearray) -> tuple[Forwarded, Routable]:
        """Parse a request and prepare it for routing; raises UserError, of which RefusedError has the status."""
        forwarded = read_forwarded(body, serving.offer, self.limits, serving.sets.form)
        plan, question = forwarded.asked.image, forwarded.question
        with self.decoding.hold(plan.nbytes if plan else 0):
            return forwarded, serving.selector.chooser.read(question, picture=smaller_picture(question.image, plan))
