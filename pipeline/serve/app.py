"""The web application: routes, authorisation, and limits that keep one client from blocking others."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pipeline.adapter.answering import Tokenised
from pipeline.data.image_limits import WORK_SIDE
from pipeline.data.smaller_pictures import Decoding, decode_smaller
from pipeline.errors import UserError
from pipeline.serve.admission import Budget, Share, read_body, unless_gone
from pipeline.serve.chat import ChatRequest, Limits, Offer, read_chat, unknown_model
from pipeline.serve.completion import completion, error_body
from pipeline.serve.images import DecodingSpace
from pipeline.serve.metrics import Metrics
from pipeline.serve.refusal import RefusedError
from pipeline.serve.reply import EventStream, Reply
from pipeline.serve.request import FullError, StoppedError, Update
from pipeline.serve.worker import Worker

logger = logging.getLogger("pipeline.serve")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Threads that read requests; few, because they compete with the model for the CPU. DecodingSpace limits their memory.
READERS = min(4, os.cpu_count() or 1)


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


class Service:
    """The endpoints of one worker."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self.worker, self.settings = worker, settings
        self.metrics, self.budget = Metrics(), Budget(settings.waiting_bytes)
        answerer, limits = worker.answerer, settings.limits
        if answerer.lmm.conversation.padded:  # images are padded to squares, so the longer side counts
            limits = replace(limits, image=replace(limits.image, side=WORK_SIDE))
        self._limits, self._decoding = limits, DecodingSpace(limits.image.decode_bytes)
        source = answerer.source
        self._offer = Offer(
            [settings.model],
            source.max_new_tokens,
            source.method.name,
            answerer.method.needs_task,
            source.blind,
        )
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self.began = int(time.time())

    def app(self) -> Starlette:
        """The application for an ASGI server; it starts and stops the worker."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.worker.start()
            yield
            self._readers.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self.worker.close)

        routes = [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{model:path}", self.model),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
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

    def _cross_origin(self) -> list[Middleware]:
        """CORS headers for the named origins; without them browsers block requests of web pages."""
        if not self.settings.origins:
            return []
        origins, headers = list(self.settings.origins), ["authorization", "content-type"]
        methods = ["GET", "POST"]
        return [Middleware(CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=headers)]

    async def chat(self, http: HttpRequest) -> Response:
        """POST /v1/chat/completions"""
        began, asked = time.perf_counter(), list[ChatRequest]()

        def done(status: int, update: Update, why: str = "") -> None:
            seconds = time.perf_counter() - began
            self.metrics.finished(status, seconds)
            if status == 200:
                self.metrics.answered(update.chosen)
            logger.info(line_of(http.client, status, seconds, asked[0] if asked else None, update, why))

        try:
            self._authorise(http)
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

    async def models(self, http: HttpRequest) -> Response:
        """GET /v1/models"""
        self._authorise(http)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, http: HttpRequest) -> Response:
        """GET /v1/models/MODEL"""
        self._authorise(http)
        if http.path_params["model"] != self.settings.model:
            raise unknown_model(http.path_params["model"], [self.settings.model])
        return JSONResponse(self._model())

    async def health(self, http: HttpRequest) -> Response:
        """GET /health: needs no key and tells only whether the worker is alive."""
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "the model has stopped"}, 200 if alive else 503)

    async def show_metrics(self, http: HttpRequest) -> Response:
        """GET /metrics"""
        self._authorise(http)
        worker = self.worker
        gauges = {"running": len(worker.running.rows), "waiting": worker.waiting, "largest_batch": worker.largest}
        counters = {"tokens_total": worker.tokens, "steps_total": worker.batches}
        return PlainTextResponse(self.metrics.text(gauges, counters), media_type="text/plain; version=0.0.4")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.began,
            "owned_by": "continual-prompts",
            "prompt_sets": self.worker.answerer.pool.names,
            "unfamiliar": self.worker.answerer.source.unfamiliar,
        }

    def _authorise(self, http: HttpRequest) -> None:
        key = self.settings.api_key
        if key is None:
            return
        kind, _, given = http.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.strip().encode()):
            raise RefusedError(
                "the API key is missing or wrong; expected it as Authorization: Bearer KEY.", 401, "invalid_api_key"
            )

    async def _begin(self, http: HttpRequest, known: list[ChatRequest]) -> Reply:
        """Read and submit a request, and wait for its first token; appends the parsed request to `known`.

        Raises RefusedError, FullError and StoppedError.
        """
        self.worker.check()  # before the body is read in vain
        with Share(self.budget) as share:
            asked, question = await self._read(http, share)
            known.append(asked)
            reply = Reply(self.worker, asked, question)
            # A stream's status is sent with its first event, so wait until it is known whether there is an answer.
            try:
                await unless_gone(http, reply.begun())
            except BaseException:
                reply.cancel()
                raise
            return reply

    async def _read(self, http: HttpRequest, share: Share) -> tuple[ChatRequest, Tokenised]:
        """Parse and tokenise a request; `share` is charged with its memory. Raises RefusedError."""
        settings, answerer = self.settings, self.worker.answerer
        body = [await read_body(http, settings.body_bytes, settings.body_seconds, share)]

        def read() -> tuple[ChatRequest, Tokenised]:
            asked, question = read_chat(body.pop(), self._offer, self._limits)
            try:
                if asked.image is not None:
                    answerer.require_fitting(question, asked.image.smaller)
                with self._decoding.hold(asked.image.nbytes if asked.image else 0):
                    smaller = None
                    if question.image is not None and asked.image is not None and not asked.image.is_whole:
                        smaller = _decoded(question.image, asked.image)
                    return asked, answerer.tokenise(question, picture=smaller)
            except RefusedError:
                raise
            except UserError as error:
                raise RefusedError(str(error)) from None
            except Exception as error:
                logger.exception("a request failed")
                message = f"the request failed ({type(error).__name__})."
                raise RefusedError(message, 500, "server_error") from error

        # Decoding large images is slow, so it runs outside of the event loop and of the model's thread.
        asked, question = await unless_gone(http, asyncio.get_running_loop().run_in_executor(self._readers, read))
        share.hold(question.nbytes)
        return asked, question

    def _refused(self, error: RefusedError | FullError | StoppedError) -> RefusedError:
        if isinstance(error, FullError):
            message = f"{self.worker.queue} requests wait already; ask again in a second."
            return RefusedError(message, 429, "rate_limit_exceeded")
        return RefusedError(str(error), 503, "server_error") if isinstance(error, StoppedError) else error


def _decoded(encoded: bytes, plan: Decoding) -> Image.Image:
    try:
        return decode_smaller(encoded, plan)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise RefusedError(f"the image is not readable ({error}); expected PNG or JPEG.") from None


async def _refusal(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {"retry-after": "1"} if error.status == 429 else {}
    if error.status in (408, 413, 415):  # the rest of a refused body is not read, so the connection is closed
        headers["connection"] = "close"
    return JSONResponse(error_body(str(error), error.code), error.status, headers)


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


async def _other_method(http: HttpRequest, error: Exception) -> Response:
    headers = getattr(error, "headers", None) or {}
    allowed = headers.get("allow", headers.get("Allow", "another method"))
    message = f"{http.url.path[:100]} does not take {http.method[:20]}; expected {allowed}."
    return JSONResponse(error_body(message, "method_not_allowed"), 405, headers)


async def _unknown(http: HttpRequest, error: Exception) -> Response:
    known = "POST /v1/chat/completions, GET /v1/models, /v1/models/MODEL, /health or /metrics"
    message = f"{http.method} {http.url.path[:100]} is not known; expected {known}."
    return JSONResponse(error_body(message, "not_found"), getattr(error, "status_code", 404))
