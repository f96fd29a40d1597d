"""A small server that does what vLLM does with an exported checkpoint: OpenAI's chat API, one request after another.

It renders the checkpoint's chat template and generates with transformers, so that answers are those of the sets that a
request names. It can be taken down, brought back at the same port, and told to break off.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image

from pipeline.adapter.vocabulary.part import PLACEHOLDER
from pipeline.serve.front.form import RESERVED
from tests.adapter.vocabulary import loaded

METRICS = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0\n"


class FakeEngine:
    """The server on a thread; `asked` holds the chat requests that it got, in order, `keys` their authorisation."""

    def __init__(self, checkpoint: Path, name: str = "engine-name", port: int = 0) -> None:
        self.model, self.processor = loaded(checkpoint)
        self.name, self.port = name, port
        self.asked, self.keys = list[dict[str, Any]](), list[str | None]()
        self.left = 0  # requests whose client left before the end
        self.breaks_after: int | None = None  # events of a stream, after which the connection breaks
        self.refuses: tuple[int, str] | None = None  # status and message for chat requests
        self.seconds = 0.0  # before each piece of an answer
        self.loras = set[str]()  # names of low-rank updates; it answers with none of them
        self.takes_vectors = True  # as vLLM with --enable-prompt-embeds
        self._lock, self._open = threading.Lock(), set[socket.socket]()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def up(self) -> FakeEngine:
        """Listen, at the port of before."""
        engine = self

        class Handler(_Handler):
            server_engine = engine

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # connections that arrive together; five by default, and others are reset

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def down(self) -> None:
        """Vanish, as a process that is killed: all connections break."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in list(self._open):
            with _ignored():
                connection.shutdown(socket.SHUT_RDWR)

    def questions(self) -> list[dict[str, Any]]:
        """The chat requests without those by which the checkpoint is verified."""
        return [body for body in self.asked if body["messages"][-1].get("content") != "?"]

    def answer(self, body: dict[str, Any]) -> list[int]:
        """The tokens of an answer; TemplateError where the chat template refuses the request."""
        vectors = list[torch.Tensor]()
        messages = [{**message, "content": _content(message, vectors)} for message in body["messages"]]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        arguments = {k: v for k, v in body.get("chat_template_kwargs", {}).items() if k in RESERVED}
        with self._lock, torch.no_grad():
            inputs = dict(self.processor.apply_chat_template(messages, **options, **arguments))
            if vectors:
                self._bring_in(inputs, torch.cat(vectors))
            length = body.get("max_tokens") or body["max_completion_tokens"]
            tokens = self.model.generate(**inputs, max_new_tokens=length, do_sample=False, pad_token_id=0)
        return tokens[0, inputs["input_ids"].shape[1] :].tolist()

    def _bring_in(self, inputs: dict[str, Any], vectors: torch.Tensor) -> None:
        """Put vectors where a request's placeholder is, by way of spare rows of the embedding table."""
        table, ids = self.model.get_input_embeddings().weight, inputs["input_ids"][0]
        (place,) = (ids == self.processor.tokenizer.convert_tokens_to_ids(PLACEHOLDER)).nonzero()[0]
        rows = torch.arange(len(table) - len(vectors), len(table))
        assert vectors.shape[1] == table.shape[1] and len(self.processor.tokenizer) <= rows[0]
        table[rows] = vectors
        inputs["input_ids"] = torch.cat([ids[:place], rows, ids[place + 1 :]])[None]
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    def text(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)


def _content(message: dict[str, Any], vectors: list[torch.Tensor]) -> list[dict[str, Any]]:
    """A message's parts as a chat template reads them; vectors that it brings are appended to `vectors`."""
    content: Any = message["content"]
    given: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    parts = list[dict[str, Any]]()
    for part in given:
        if part["type"] == "image_url":
            parts.append({"type": "image", "image": _picture(part["image_url"]["url"])})
        elif part["type"] == "prompt_embeds":
            vectors.append(torch.load(io.BytesIO(base64.b64decode(part["data"], validate=True)), weights_only=True))
            parts.append({"type": "text", "text": PLACEHOLDER})
        else:
            parts.append(part)
    return parts


def _picture(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")


class _ignored:
    """Errors of connections that are gone anyhow."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return isinstance(error, OSError)


class _Handler(BaseHTTPRequestHandler):
    server_engine: FakeEngine
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server_engine._open.add(self.connection)

    def finish(self) -> None:
        self.server_engine._open.discard(self.connection)
        with _ignored():
            super().finish()

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        engine = self.server_engine
        if self.path == "/health":
            self._send(200, b"", "text/plain")
        elif self.path == "/metrics":
            self._send(200, METRICS.encode(), "text/plain")
        elif self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": engine.name, "object": "model", "root": "somewhere"}]})
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        engine = self.server_engine
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        engine.asked.append(body)
        engine.keys.append(self.headers.get("authorization"))
        try:
            self._chat(engine, body)
        except OSError:
            engine.left += 1

    def _chat(self, engine: FakeEngine, body: dict[str, Any]) -> None:
        if body["model"] not in {engine.name, *engine.loras}:
            self._error(404, f"The model `{body['model']}` does not exist.")
            return
        if engine.refuses is not None and body["messages"][-1].get("content") != "?":
            self._error(*engine.refuses)
            return
        first = body["messages"][0].get("content")
        if not engine.takes_vectors and isinstance(first, list) and first[0]["type"] == "prompt_embeds":
            self._error(400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`")
            return
        try:
            tokens = engine.answer(body)
        except TemplateError as error:
            self._error(400, str(error))
            return
        common = {"id": "chatcmpl-1", "created": 1, "model": engine.name}
        usage = {"prompt_tokens": 7, "completion_tokens": len(tokens), "total_tokens": 7 + len(tokens)}
        if body.get("stream"):
            self._stream(engine, body, common, tokens, usage)
            return
        message = {"role": "assistant", "content": engine.text(tokens)}
        choices = [
            {"index": number, "message": message, "finish_reason": "length"} for number in range(body.get("n", 1))
        ]
        time.sleep(engine.seconds)
        self._json(200, {**common, "object": "chat.completion", "choices": choices, "usage": usage})

    def _stream(
        self, engine: FakeEngine, body: dict[str, Any], common: dict[str, Any], tokens: list[int], usage: dict[str, int]
    ) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for number, content in enumerate(self._events(engine, body, common, tokens, usage)):
            if number == engine.breaks_after:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            time.sleep(engine.seconds)
            self.wfile.write(f"data: {content}\n\n".encode())
            self.wfile.flush()

    def _events(
        self, engine: FakeEngine, body: dict[str, Any], common: dict[str, Any], tokens: list[int], usage: dict[str, int]
    ) -> Iterator[str]:
        def piece(delta: dict[str, Any], finish: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish}
            return json.dumps({**common, "object": "chat.completion.chunk", "choices": [choice]})

        yield piece({"role": "assistant", "content": ""})
        sent = ""
        for number in range(1, len(tokens) + 1):
            text = engine.text(tokens[:number])
            if not text.endswith("\ufffd") or number == len(tokens):
                yield piece({"content": text[len(sent) :]})
                sent = text
        yield piece({}, "length")
        if (body.get("stream_options") or {}).get("include_usage"):
            yield json.dumps({**common, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield "[DONE]"

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}})

    def _json(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
