"""Replies of the engine, passed on: the model gets its name here, and how the prompt sets were chosen is added."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from httpx2 import Response, StreamError, TransportError
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pipeline.adapter.answer import Chosen
from pipeline.serve.completion import about, error_body
from pipeline.serve.front.engine import Engine
from pipeline.serve.refusal import RefusedError
from pipeline.serve.reply import END, HEADERS, event
from pipeline.serve.request import Update

DATA, LAST = "data:", "[DONE]"


@dataclass(frozen=True)
class Passed:
    """The engine's reply to one request, of which the head has arrived."""

    engine: Engine
    response: Response
    model: str  # its name here
    chosen: Chosen
    ignored: Sequence[str]

    async def whole(self) -> tuple[dict[str, Any], Update]:
        """The complete reply and what is counted of it; raises RefusedError (503) where the engine is lost."""
        try:
            content = await self.response.aread()
        except (TransportError, StreamError) as error:
            raise self.engine.lost(error) from None
        try:
            reply = dict(json.loads(content))
        except (ValueError, TypeError) as error:
            raise self.engine.lost(ValueError(f"its reply is no JSON object: {error}")) from None
        update = self.updated(Update(chosen=self.chosen), reply)
        return {**reply, "model": self.model, **about(update, self.ignored)}, update

    def updated(self, update: Update, reply: dict[str, Any]) -> Update:
        """What is counted, after a reply or an event of one."""
        usage = reply.get("usage")
        if not isinstance(usage, dict):
            return update
        prompt, answer = (usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens"))
        return replace(update, prompt_tokens=prompt, completion_tokens=answer)


class PassedStream(StreamingResponse):
    """A streamed reply of the engine, event by event; calls `done` once at its end, also when the client disconnects.

    `held` is closed at the end: the connection to the engine, which cancels the request there.
    """

    def __init__(self, passed: Passed, held: contextlib.AsyncExitStack, done: Callable[..., None]) -> None:
        super().__init__(self._events(), headers=HEADERS, media_type="text/event-stream")
        self._passed, self._held, self._done = passed, held, done
        self._status, self._update = 499, Update(chosen=passed.chosen)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._held:
                await super().__call__(scope, receive, send)
        finally:
            self._done(self._status, self._update)

    async def _events(self) -> AsyncIterator[str]:
        passed, first = self._passed, True
        try:
            async for line in passed.response.aiter_lines():
                if not line.startswith(DATA):
                    continue
                content = line.removeprefix(DATA).strip()
                if content == LAST:
                    self._status = 200 if self._status == 499 else self._status
                    break
                piece = json.loads(content)
                if "error" in piece:
                    self._status = 500
                else:
                    self._update = passed.updated(self._update, piece)
                    piece["model"] = passed.model
                    if first:
                        piece |= about(self._update, passed.ignored)
                        first = False
                yield event(piece)
            else:
                raise passed.engine.lost(ValueError("it ended in the middle of an answer"))
        except (TransportError, StreamError, ValueError) as error:
            yield self._failed(passed.engine.lost(error))
        except RefusedError as error:
            yield self._failed(error)
        yield END

    def _failed(self, error: RefusedError) -> str:
        self._status = error.status
        return event(error_body(str(error), error.code))
