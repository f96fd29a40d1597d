"""Requests against the application in this process, where a test says when what arrives and who leaves."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import dataclass, field
from typing import Any

from pipeline.adapter.answering import Answerer
from pipeline.serve.app import Service
from pipeline.serve.request import Request, Update
from pipeline.serve.worker import Worker

LEAVES: dict[str, Any] = {"type": "http.disconnect"}
SILENCE: dict[str, Any] = {}  # nothing comes any more, until the caller is gone


@dataclass
class Caller:
    """Sends `messages` one by one, then nothing until it is `gone`; keeps what it is answered."""

    messages: list[dict[str, Any]]
    received: list[dict[str, Any]] = field(default_factory=list)
    reads: int = 0  # messages that were asked for
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, service: Service, path: str = "/v1/chat/completions", method: str = "POST") -> Caller:
        scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "http_version": "1.1",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
            "scheme": "http",
            "root_path": "",
        }
        await service.app()(scope, self._receive, self._send)
        return self

    async def _receive(self) -> dict[str, Any]:
        self.reads += 1
        message = self.messages.pop(0) if self.messages else SILENCE
        if message is LEAVES:
            self.gone.set()
        if message is SILENCE:
            await self.gone.wait()
        return message or LEAVES

    async def _send(self, message: Any) -> None:
        self.received.append(message)

    @property
    def status(self) -> int:
        return self.received[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.received[0]["headers"]}

    @property
    def body(self) -> str:
        return b"".join(message.get("body", b"") for message in self.received[1:]).decode()

    @property
    def error(self) -> str:
        return json.loads(self.body)["error"]["message"]


class Scripted(Worker):
    """Tells every request the same updates, `seconds` apart, and keeps the requests; the model is not run."""

    def __init__(self, answerer: Answerer, *updates: Update, seconds: float = 0.0, queue: int = 8) -> None:
        super().__init__(answerer, 2, queue)
        self.updates, self.seconds = updates, seconds
        self.requests: list[Request] = []

    def submit(self, request: Request) -> None:
        super().submit(request)
        self.requests.append(request)
        for number, update in enumerate(self.updates):
            asyncio.get_running_loop().call_later(number * self.seconds, request.tell, update)


def post(service: Service, *messages: dict[str, Any]) -> Caller:
    """A chat request that arrives in these messages."""
    return asyncio.run(Caller(list(messages)).call(service))


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def chat(text: str = "what?", image: bytes | None = None, **fields: Any) -> dict[str, Any]:
    """The one message of a chat request."""
    parts: list[Any] = [{"type": "text", "text": text}]
    if image is not None:
        address = "data:image/png;base64," + base64.b64encode(image).decode()
        parts.append({"type": "image_url", "image_url": {"url": address}})
    return part(json.dumps({"model": "m", "messages": [{"role": "user", "content": parts}], **fields}).encode())
