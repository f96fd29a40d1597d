"""What both services over HTTP have: routes, authorisation, the list of models, the log line, and refusals."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pipeline.adapter.source import Source
from pipeline.data.smaller_pictures import Decoding, decode_smaller
from pipeline.errors import UserError
from pipeline.methods import make_method
from pipeline.serve.admission import Budget, Share, read_body, unless_gone
from pipeline.serve.chat import ChatRequest, Limits, Offer, unknown_model
from pipeline.serve.completion import error_body
from pipeline.serve.images import DecodingSpace
from pipeline.serve.metrics import Metrics
from pipeline.serve.refusal import RefusedError
from pipeline.serve.request import Update

logger = logging.getLogger("pipeline.serve")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Threads that read requests; few, because they compete with the model for the CPU. DecodingSpace limits their memory.
READERS = min(4, os.cpu_count() or 1)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """Settings of the service."""

    model: str
    host: str = "127.0.0.1"
    api_key: str | None = None
    body_bytes: int = 8 << 20
    body_seconds: float = 20.0  # for the whole body of a request to arrive
    waiting_bytes: int = 512 << 20  # of all requests together, from reading their bodies to their first tokens
    limits: Limits = field(default_factory=Limits)
    origins: tuple[str, ...] = ()  # of web pages that may send requests (CORS)


class WebService(ABC):
    """The endpoints of a pool of prompt sets; subclasses say how a chat request is answered."""

    def __init__(self, source: Source, settings: Settings, limits: Limits) -> None:
        self.source, self.settings, self.limits = source, settings, limits
        self.metrics, self.budget = Metrics(), Budget(settings.waiting_bytes)
        self.decoding = DecodingSpace(limits.image.decode_bytes)
        self.offer = self.offer_of(source)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self.began = int(time.time())

    def offer_of(self, source: Source) -> Offer:
        """What clients may ask of these sets."""
        needs_task = make_method(source.method).needs_task
        return Offer([self.settings.model], source.max_new_tokens, source.method.name, needs_task, source.blind)

    def app(self) -> Starlette:
        """The application for an ASGI server; it starts and stops what answers."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            async with self.running():
                yield
                self._readers.shutdown(wait=False, cancel_futures=True)

        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            *self.further_routes(),
        ]
        # Against DNS rebinding: a web page must not reach a service on loopback by a host name of its own.
        local = self.settings.host in LOOPBACK
        # Starlette's middleware splits at the first colon, so "[::1]:8000" becomes "[".
        hosts = [*LOOPBACK, "[::1]", "["] if local else ["*"]
        return Starlette(
            routes=routes,
            lifespan=lifespan,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts), *self._cross_origin()],
            exception_handlers={RefusedError: _refusal, 404: _unknown, 405: _other_method},
        )

    def running(self) -> contextlib.AbstractAsyncContextManager[None]:
        """What runs as long as the application does; by default nothing."""
        return contextlib.nullcontext()

    def further_routes(self) -> list[Route]:
        """Endpoints that not every service has."""
        return []

    @abstractmethod
    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions"""

    @abstractmethod
    async def ailing(self) -> str:
        """Why questions are not answered at the moment, one sentence; "" while they are."""

    @abstractmethod
    async def metrics_text(self) -> str:
        """The page of GET /metrics."""

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models"""
        self.authorise(http)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/MODEL"""
        self.authorise(http)
        if http.path_params["model"] != self.settings.model:
            raise unknown_model(http.path_params["model"], [self.settings.model])
        return JSONResponse(self._model())

    async def health(self, http: HttpRequest) -> Response:
        """GET /health: needs no key and tells only whether questions are answered."""
        why = await self.ailing()
        return JSONResponse({"status": why or "ok"}, 503 if why else 200)

    async def show_metrics(self, http: HttpRequest) -> Response:
        """GET /metrics"""
        self.authorise(http)
        return PlainTextResponse(await self.metrics_text(), media_type="text/plain; version=0.0.4")

    def authorise(self, http: HttpRequest) -> None:
        """Raise RefusedError (401) for a request without the service's key."""
        key = self.settings.api_key
        if key is None:
            return
        kind, _, given = http.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.strip().encode()):
            raise RefusedError(
                "the API key is missing or wrong; expected it as Authorization: Bearer KEY.", 401, "invalid_api_key"
            )

    def ending(self, http: HttpRequest, asked: list[ChatRequest]) -> Callable[..., None]:
        """What counts and logs the end of a chat request, whose fields are appended to `asked` once they are read."""
        began = time.perf_counter()

        def done(status: int, update: Update, why: str = "") -> None:
            seconds = time.perf_counter() - began
            self.metrics.finished(status, seconds)
            if status == 200:
                self.metrics.answered(update.chosen)
            logger.info(line_of(http.client, status, seconds, asked[0] if asked else None, update, why))

        return done

    async def read(self, http: HttpRequest, share: Share, read: Callable[[bytearray], Result]) -> Result:
        """What `read` makes of a request's body in a reader thread; `share` is charged with the body's memory.

        Decoding large images is slow, so it runs outside of the event loop and of the model's thread. Raises
        RefusedError, also in place of UserError and of what is unexpected.
        """
        settings = self.settings
        body = [await read_body(http, settings.body_bytes, settings.body_seconds, share)]

        def guarded() -> Result:
            try:
                return read(body.pop())
            except RefusedError:
                raise
            except UserError as error:
                raise RefusedError(str(error)) from None
            except Exception as error:
                logger.exception("a request failed")
                message = f"the request failed ({type(error).__name__})."
                raise RefusedError(message, 500, "server_error") from error

        return await unless_gone(http, asyncio.get_running_loop().run_in_executor(self._readers, guarded))

    def _cross_origin(self) -> list[Middleware]:
        """CORS headers for the named origins; without them browsers block requests of web pages."""
        if not self.settings.origins:
            return []
        origins, headers = list(self.settings.origins), ["authorization", "content-type"]
        methods = ["GET", "POST"]
        return [Middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers)]

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.began,
            "owned_by": "continual-prompts",
            "prompt_sets": self.source.pool.names,
            "unfamiliar": self.source.unfamiliar,
        }


def smaller_picture(encoded: bytes | None, plan: Decoding | None) -> Image.Image | None:
    """The picture of a request reduced as planned; None where there is none or it stays as it is."""
    if encoded is None or plan is None or plan.is_whole:
        return None
    try:
        return decode_smaller(encoded, plan)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise RefusedError(f"the image is not readable ({error}); expected PNG or JPEG.") from None


def line_of(client: Any, status: int, seconds: float, asked: ChatRequest | None, update: Update, why: str) -> str:
    """The log line of a request, without the texts of question and answer."""
    parts = [client.host if client else "-", f"{status} {why}".rstrip(), f"{seconds:.2f} s"]
    if asked is not None and asked.image is not None:
        image = asked.image
        parts.append(f"{image.format} {image.width}x{image.height}")
    if update.completion_tokens:
        parts.append(f"{update.prompt_tokens}+{update.completion_tokens} tokens")
    if update.chosen.selected:
        parts.append("+".join(map(update.chosen.scored, update.chosen.selected)))
    if update.chosen.unfamiliar:
        parts.append("unfamiliar")
    return ", ".join(parts)


async def _refusal(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"retry-after": "1"} if error.status == 429 else {}
    if error.status in (408, 413, 415):  # the rest of a refused body is not read, so the connection is closed
        headers["connection"] = "close"
    return JSONResponse(error_body(str(error), error.code), error.status, headers)


async def _other_method(http: HttpRequest, error: Exception) -> Response:
    headers = getattr(error, "headers", None) or {}
    allowed = headers.get("allow", headers.get("Allow", "another method"))
    message = f"{http.url.path[:100]} does not take {http.method[:20]}; expected {allowed}."
    return JSONResponse(error_body(message, "method_not_allowed"), 405, headers)


async def _unknown(http: HttpRequest, error: Exception) -> Response:
    known = "POST /v1/chat/completions, GET /v1/models, /v1/models/MODEL, /health or /metrics"
    message = f"{http.method} {http.url.path[:100]} is not known; expected {known}."
    return JSONResponse(error_body(message, "not_found"), getattr(error, "status_code", 404))
