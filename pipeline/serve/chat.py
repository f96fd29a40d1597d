"""What a chat request asks, checked field by field, and the replies: the OpenAI protocol as far as it applies here.

The models answer one question about at most one image, greedily. Of a conversation the last user message is answered,
about its own image or, when it has none, the latest one before it.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from pipeline.answering import Question
from pipeline.errors import nearest
from pipeline.serve.worker import Update

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Fields that change what a reply means and that nothing here could honour.
REFUSED = ("tools", "functions", "tool_choice", "logprobs", "audio", "modalities", "response_format", "stop")
# What some clients write out of what is the case anyway.
HARMLESS: dict[str, Any] = {"tool_choice": "none", "modalities": ["text"], "response_format": {"type": "text"}}


class RefusedError(Exception):
    """A request is not answered; `status` is the HTTP status, `code` a word for programs."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Limits:
    """What a single request may ask for."""

    image_pixels: int = 4096 * 4096
    question_characters: int = 8192
    tokens: int = 256
    messages: int = 256


@dataclass(frozen=True)
class ChatRequest:
    """What a checked request wants beside the answer to its question."""

    model: str
    longest: int
    stream: bool
    include_usage: bool


def read_chat(body: bytes, models: Sequence[str], longest: int, limits: Limits) -> tuple[ChatRequest, Question]:
    """Return what a request body asks; `longest` is the number of tokens when it does not say.

    Raises RefusedError with a sentence: what was found, what was expected.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is not JSON ({str(error)[:100]}); expected a chat request.") from None
    if not isinstance(fields, dict):
        raise RefusedError(f"the body is {_kind(fields)}; expected an object with model and messages.")
    model = fields.get("model")
    if model not in models:
        raise unknown_model(model, models)
    for name in REFUSED:
        if fields.get(name) not in (None, [], {}, False, HARMLESS.get(name)):
            raise RefusedError(f"{name} is set; expected it to be left out: answers are short plain texts.")
    if fields.get("n") not in (None, 1):
        raise RefusedError(f"n is {str(fields['n'])[:20]}; expected 1: answers are greedy, so all would be equal.")
    asked = fields.get("max_completion_tokens")
    if asked is None:  # null is as good as left out
        asked = fields.get("max_tokens")
    if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or not 1 <= asked <= limits.tokens):
        raise RefusedError(f"max_tokens is {str(asked)[:20]}; expected a number from 1 to {limits.tokens}.")
    task = fields.get("task")
    if task is not None and not isinstance(task, str):
        raise RefusedError(f"task is {_kind(task)}; expected the name of a task.")
    stream = fields.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise RefusedError(f"stream is {_kind(stream)}; expected true or false.")
    text, image = _last_question(fields.get("messages"), limits)
    options = fields.get("stream_options")
    include_usage = bool(options.get("include_usage")) if isinstance(options, dict) else False
    request = ChatRequest(str(model), asked or min(longest, limits.tokens), stream is True, include_usage)
    return request, Question(text, image, task)


def unknown_model(model: Any, models: Sequence[str]) -> RefusedError:
    """What is said of a model that is not served."""
    found = str(model)[:100]
    return RefusedError(
        f"model is {found!r}; expected {' or '.join(models)}.{nearest(found, models)}", 404, "model_not_found"
    )


def _last_question(messages: Any, limits: Limits) -> tuple[str, bytes | None]:
    """The text of the last user message and the image it is about."""
    if not isinstance(messages, list) or not messages:
        raise RefusedError(f"messages is {_kind(messages)}; expected a list with at least one user message.")
    if len(messages) > limits.messages:
        raise RefusedError(f"there are {len(messages)} messages; expected at most {limits.messages}.")
    asked = [message for message in messages if isinstance(message, dict) and message.get("role") == "user"]
    if not asked or messages[-1] is not asked[-1]:
        raise RefusedError("the last message is not from the user; expected a question, role user.")
    text, image = "", None
    for place, message in enumerate(reversed(asked)):
        found, address = _parts(message.get("content"))
        if place == 0:
            text = found
        if address is not None:
            image = read_image(address, limits)
            break
    if not text.strip():
        raise RefusedError("the last user message has no text; expected a question.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RefusedError("the question holds half a surrogate pair; expected valid Unicode text.") from None
    if len(text) > limits.question_characters:
        raise RefusedError(
            f"the question has {len(text)} characters; expected at most {limits.question_characters}.", 413
        )
    return text, image


def _parts(content: Any) -> tuple[str, str | None]:
    """Text and image address of a message's content."""
    if isinstance(content, str):
        return content, None
    expected = (
        "expected text, or a list of parts {type: text, text} and at most one {type: image_url, image_url: {url}}"
    )
    if not isinstance(content, list):
        raise RefusedError(f"content is {_kind(content)}; {expected}.")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            address = part.get("image_url")
            address = address.get("url") if isinstance(address, dict) else address
            if not isinstance(address, str):
                raise RefusedError(f"image_url has no url; {expected}.")
            images.append(address)
        else:
            raise RefusedError(f"a part of content has the type {str(kind)[:40]!r}; {expected}.")
    if len(images) > 1:
        raise RefusedError(f"a message has {len(images)} images; {expected}.")
    return "\n".join(texts), images[0] if images else None


def read_image(address: str, limits: Limits) -> bytes:
    """The file bytes in a data URI, once its header shows an image of a size that may be decoded.

    Nothing is ever fetched: an http address would let a caller look into this machine's network.
    """
    head, comma, data = address.partition(",")
    if not head.startswith("data:") or not comma:
        raise RefusedError(
            f"the image's url begins with {address[:20]!r}; expected a data URI, data:image/png;base64,... "
            "(addresses are not fetched)."
        )
    if not head.endswith(";base64"):
        raise RefusedError("the image's data URI is not base64; expected data:image/png;base64,...")
    try:
        encoded = base64.b64decode("".join(data.split()), validate=True)  # many encoders break lines
    except (binascii.Error, ValueError) as error:
        raise RefusedError(f"the image's data URI is not base64 ({error}); encode the file's bytes.") from None
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
            width, height = picture.size
    except Image.DecompressionBombError:
        raise RefusedError(f"the image is huge; expected at most {limits.image_pixels} pixels.", 413) from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise RefusedError(
            f"the image is not readable ({type(error).__name__}); expected {', '.join(FORMATS)}."
        ) from None
    if width * height > limits.image_pixels:
        raise RefusedError(
            f"the image has {width} x {height} pixels; expected at most {limits.image_pixels} in all.", 413
        )
    return encoded


def new_id() -> str:
    """An id for a reply."""
    return f"chatcmpl-{uuid.uuid4().hex[:24]}"


def completion(identity: str, model: str, update: Update) -> dict[str, Any]:
    """The whole reply."""
    message = {"role": "assistant", "content": update.text}
    return {
        **_envelope(identity, model, "chat.completion"),
        "choices": [{"index": 0, "message": message, "finish_reason": update.finish, "logprobs": None}],
        "usage": usage(update),
        "prompt_sets": prompt_sets(update),
    }


def chunk(identity: str, model: str, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """One event of a streamed reply."""
    choices = [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
    return {**_envelope(identity, model, "chat.completion.chunk"), "choices": choices}


def usage(update: Update) -> dict[str, int]:
    """Numbers of tokens; those of the prompt count image and prompt vectors."""
    whole = update.prompt_tokens + update.completion_tokens
    return {
        "prompt_tokens": update.prompt_tokens, "completion_tokens": update.completion_tokens, "total_tokens": whole,
    }  # fmt: skip


def prompt_sets(update: Update) -> dict[str, Any]:
    """Which prompt sets answered, and how similar the question is to each."""
    return {"selected": update.selected, "similarity": update.similarity}


def error_body(message: str, code: str) -> dict[str, Any]:
    """An error as the protocol has it."""
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


def _envelope(identity: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "missing", bool: "true or false"}
    return names.get(type(value), "a number")
