"""The web application: routes, who may ask, and the limits that keep one caller from stopping the others."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from pipeline.serve.chat import (
    BadRequestError,
    ChatRequest,
    Limits,
    chunk,
    completion,
    error_body,
    new_id,
    prompt_sets,
    read_chat,
    usage,
)
from pipeline.serve.metrics import Metrics
from pipeline.serve.worker import FullError, Request, Update, Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
STATUS = {"refused": 400, "failed": 500}


@dataclass(frozen=True)
class Settings:
    """How the service is offered."""

    model: str
    host: str = "127.0.0.1"
    api_key: str | None = None
    body_bytes: int = 8 << 20
    body_seconds: float = 20.0  # for the whole body of a request to arrive
    limits: Limits = field(default_factory=Limits)


class Service:
    """The endpoints over one worker."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker, self.settings = worker, settings
        self.metrics = Metrics()
        self.began = int(time.time())

    def app(self) -> Starlette:
        """The application for an ASGI server; it starts and stops the worker."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.worker.start()
            yield
            await asyncio.to_thread(self.worker.close)

        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
        ]
        # A page in a browser must not reach a service on loopback through a name of its own.
        local = self.settings.host in LOOPBACK
        # Of "[::1]:8000" the middleware sees only what stands before the first colon.
        hosts = [*LOOPBACK, "[::1]", "["] if local else ["*"]
        return Starlette(
            routes=routes,
            lifespan=lifespan,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={BadRequestError: _refusal, 404: _unknown, 405: _unknown},
        )

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions"""
        began = time.perf_counter()
        try:
            self._authorise(http)
            body = await self._body(http)
            # Image headers and base64 of megabytes take their time, which must not be that of other requests.
            asked = await asyncio.to_thread(
                read_chat, body, [self.settings.model], self.worker.answerer.source.max_new_tokens, self.settings.limits
            )
            reply = _Reply(self.worker, asked)
        except BadRequestError as error:
            self.metrics.finished(error.status, time.perf_counter() - began)
            raise
        except FullError:
            self.metrics.finished(429, time.perf_counter() - began)
            message = f"{self.worker.queue} requests wait already; ask again in a second."
            return JSONResponse(error_body(message, "rate_limit_exceeded"), 429, {"retry-after": "1"})
        if asked.stream:
            return StreamingResponse(self._events(reply, began), media_type="text/event-stream")
        with reply:
            update = await self._last(http, reply)
        status = STATUS.get(str(update.finish), 200)
        self._count(status, began, update)
        if status != 200:
            return JSONResponse(error_body(str(update.error), _code(status)), status)
        return JSONResponse(completion(reply.identity, asked.model, update))

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models"""
        self._authorise(http)
        pool = self.worker.answerer.pool
        model = {
            "id": self.settings.model, "object": "model", "created": self.began, "owned_by": "continual-prompts",
            "prompt_sets": pool.names,
        }  # fmt: skip
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self, http: HttpRequest) -> Response:
        """GET /health: no key is needed, and nothing but being alive is told."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "the model has stopped"}, 200 if alive else 503)

    async def show_metrics(self, http: HttpRequest) -> Response:
        """GET /metrics"""
        self._authorise(http)
        worker = self.worker
        gauges = {"running": len(worker.running.rows), "waiting": worker.waiting, "largest_batch": worker.largest}
        counters = {"tokens_total": worker.tokens, "steps_total": worker.batches}
        return PlainTextResponse(self.metrics.text(gauges, counters), media_type="text/plain; version=0.0.4")

    def _authorise(self, http: HttpRequest) -> None:
        key = self.settings.api_key
        if key is None:
            return
        kind, _, given = http.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise BadRequestError("the API key is missing or wrong; expected it as Authorization: Bearer KEY.", 401,
                                  "invalid_api_key")  # fmt: skip

    async def _body(self, http: HttpRequest) -> bytes:
        """The request's body, which has to be JSON, small, and there in time."""
        limit = self.settings.body_bytes
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Also what keeps pages of other origins in a browser from posting here without being asked first.
            raise BadRequestError("content-type is not application/json; expected a JSON body.", 415)
        too_large = BadRequestError(f"the body is too large; expected at most {limit} bytes.", 413)
        announced = http.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > limit:
            raise too_large

        async def whole() -> bytes:
            parts, size = [], 0
            async for part in http.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
            return b"".join(parts)

        try:
            return await asyncio.wait_for(whole(), self.settings.body_seconds)
        except asyncio.TimeoutError:
            seconds = self.settings.body_seconds
            raise BadRequestError(f"the body did not arrive within {seconds:g} seconds.", 408, "timeout") from None
        except ClientDisconnect:
            raise BadRequestError("the caller left before its request was whole.", 400) from None

    async def _last(self, http: HttpRequest, reply: _Reply) -> Update:
        """The last update of a reply; a caller who leaves ends it."""
        while True:
            try:
                update = await asyncio.wait_for(reply.updates.get(), 1.0)
            except asyncio.TimeoutError:
                if await http.is_disconnected():
                    return Update(finish="failed", error="the caller left.")
                continue
            if update.finish is not None:
                return update

    async def _events(self, reply: _Reply, began: float) -> AsyncIterator[str]:
        """The events of a streamed reply; leaving the generator, as when the caller is gone, ends the request."""
        identity, model = reply.identity, reply.asked.model
        sent, update = "", Update(finish="failed", error="the caller left.")
        with reply:
            try:
                first = True
                while True:
                    update = await reply.updates.get()
                    if update.error is not None:
                        yield _event(error_body(update.error, _code(STATUS[str(update.finish)])))
                        return
                    if first:
                        yield _event(
                            {**chunk(identity, model, {"role": "assistant", "content": ""}),
                             "prompt_sets": prompt_sets(update)}
                        )  # fmt: skip
                        first = False
                    # A character may need several tokens: until it is whole, its text is not final.
                    ready = update.text if update.finish else update.text.rstrip("\ufffd")
                    if ready.startswith(sent) and len(ready) > len(sent):
                        yield _event(chunk(identity, model, {"content": ready[len(sent) :]}))
                        sent = ready
                    if update.finish is not None:
                        break
                yield _event(chunk(identity, model, {}, update.finish))
                if reply.asked.include_usage:
                    yield _event({**chunk(identity, model, {}), "choices": [], "usage": usage(update)})
                yield "data: [DONE]\n\n"
            finally:
                self._count(STATUS.get(str(update.finish), 200) if update.finish else 499, began, update)

    def _count(self, status: int, began: float, update: Update) -> None:
        self.metrics.finished(status, time.perf_counter() - began)
        if status == 200:
            self.metrics.sets.update(update.selected)


class _Reply:
    """A request on its way: its updates arrive in the event loop; leaving the block cancels it."""

    def __init__(self, worker: Worker, asked: ChatRequest) -> None:
        self.asked, self.identity = asked, new_id()
        self.updates: asyncio.Queue[Update] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have been closed meanwhile
                loop.call_soon_threadsafe(self.updates.put_nowait, update)

        self._request = Request(asked.question, asked.longest, tell)
        worker.submit(self._request)

    def __enter__(self) -> _Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self._request.cancelled = True


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _code(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


async def _refusal(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, BadRequestError)
    # What is left of a refused body is not read: the connection ends instead.
    headers = {"connection": "close"} if error.status in (408, 413, 415) else None
    return JSONResponse(error_body(str(error), error.code), error.status, headers)


async def _unknown(http: HttpRequest, error: Exception) -> Response:
    known = "POST /v1/chat/completions, GET /v1/models, /health or /metrics"
    message = f"{http.method} {http.url.path[:100]} is not known; expected {known}."
    return JSONResponse(error_body(message, "not_found"), getattr(error, "status_code", 404))
