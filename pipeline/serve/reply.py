"""Replies in progress: passes updates from the model's thread to the event loop, and streams them as events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import takewhile
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pipeline.adapter.answering import Tokenised
from pipeline.serve.chat import ChatRequest
from pipeline.serve.completion import about, chunk, error_body, new_id, usage
from pipeline.serve.refusal import RefusedError
from pipeline.serve.request import Request, Update
from pipeline.serve.worker import Worker

STATUS = {"refused": 400, "too_large": 413, "failed": 500, "stopped": 503}
# Without these a proxy may buffer the events or cache them.
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
END = "data: [DONE]\n\n"  # of every stream
JOINED = 3  # tokenizers that clean up spaces may remove one that precedes up to this many characters: " n't"


class Reply:
    """A submitted request and its answer so far; the end of the block cancels it."""

    def __init__(self, worker: Worker, asked: ChatRequest, question: Tokenised) -> None:
        """Submit the question; raises FullError and StoppedError."""
        self.identity, self.model = new_id(), asked.model
        self.stream, self.include_usage = asked.stream, asked.include_usage
        self.stops, self.ignored = asked.stops, asked.ignored
        self._worker, self._latest, self._changed = worker, Update(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def tell(update: Update) -> None:
            with contextlib.suppress(RuntimeError):  # the loop may have been closed meanwhile
                loop.call_soon_threadsafe(self._take, update)

        self._request = Request(question, asked.longest, tell, asked.stops, asked.stream)
        worker.submit(self._request)

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Cancel the request."""
        self._worker.cancel(self._request)

    async def begun(self) -> None:
        """Wait for the first token; raises RefusedError where the request fails before."""
        await self._changed.wait()
        checked(self._latest)

    async def updates(self) -> AsyncIterator[Update]:
        """Yield the answer so far until it is finished; updates between two reads are skipped but for the latest.

        Raises RefusedError when the answer fails.
        """
        while True:
            await self._changed.wait()
            self._changed.clear()
            update = checked(self._latest)
            yield update
            if update.finish is not None:
                return

    async def last(self) -> Update:
        """The finished answer; raises RefusedError when it fails."""
        update = Update()
        async for update in self.updates():  # noqa: B007
            pass
        return update

    def _take(self, update: Update) -> None:
        if self._latest.finish is None:
            self._latest = update
            self._changed.set()


def checked(update: Update) -> Update:
    """Return the update, or raise its error as RefusedError."""
    if update.error is not None:
        status = STATUS[str(update.finish)]
        raise RefusedError(update.error, status, "server_error" if status >= 500 else "invalid_request_error")
    return update


class EventStream(StreamingResponse):
    """A streamed reply whose answer has begun; calls `done` once at its end, also when the client disconnects."""

    def __init__(self, reply: Reply, done: Callable[[int, Update], None]) -> None:
        super().__init__(self._events(), headers=HEADERS, media_type="text/event-stream")
        self._reply, self._done = reply, done
        self._status, self._update = 499, Update()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._reply:
                await super().__call__(scope, receive, send)
        finally:
            self._done(self._status, self._update)

    async def _events(self) -> AsyncIterator[str]:
        reply, sent = self._reply, ""
        identity, model = reply.identity, reply.model
        opening = chunk(identity, model, {"role": "assistant", "content": ""})
        try:
            async for update in reply.updates():
                if not self._update.completion_tokens:
                    yield event({**opening, **about(update, reply.ignored)})
                self._update = update
                piece = following(sent, update, reply.stops)
                if piece:
                    yield event(chunk(identity, model, {"content": piece}))
                    sent += piece
        except RefusedError as error:
            self._status = error.status
            yield event(error_body(str(error), error.code))
        else:
            self._status = 200
            yield event(chunk(identity, model, {}, self._update.finish))
            if reply.include_usage:
                yield event({**chunk(identity, model, {}), "choices": [], "usage": usage(self._update)})
        yield END


def following(sent: str, update: Update, stops: Sequence[str] = ()) -> str:
    """The part of the answer so far that follows `sent` and that later tokens cannot change.

    Held back are incomplete characters, spaces that a tokenizer may still remove, and a possible beginning of a stop
    text. A finished answer gives everything from the first character that differs from `sent`.
    """
    text = update.text
    if update.finish is not None:
        equal = takewhile(lambda pair: pair[0] == pair[1], zip(sent, text, strict=False))
        return text[len(list(equal)) :]
    text = text.rstrip("\ufffd")  # a character may need several tokens
    space = text.rfind(" ")
    if space >= 0 and len(text) - space - 1 <= JOINED:
        text = text[:space]
    text = text[: len(text) - max((_begun(text, stop) for stop in stops), default=0)]
    return text[len(sent) :] if text.startswith(sent) else ""


def _begun(text: str, stop: str) -> int:
    """Number of characters at the end of the text that may be the beginning of a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def event(content: dict[str, Any]) -> str:
    """An event of a stream, as server-sent events write it."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
