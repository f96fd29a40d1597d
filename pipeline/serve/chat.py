"""Parsing and validation of chat requests: the subset of the OpenAI protocol that is supported here.

The models answer one question about at most one image, greedily. Of a conversation the last user message is answered,
with its own image or, without one, with the latest image before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.adapter.answering import Question
from pipeline.data.smaller_pictures import Decoding
from pipeline.errors import nearest
from pipeline.serve import fields as checked
from pipeline.serve.images import ImageLimits, plan_image, read_image
from pipeline.serve.json_body import JsonBody
from pipeline.serve.refusal import RefusedError, kind_of, shown

INSTRUCTING = ("system", "developer")
ROLES = ("user", "assistant", *INSTRUCTING)
PARTS = "expected text, or a list of parts {type: text, text} and at most one {type: image_url, image_url: {url}}"


@dataclass(frozen=True)
class Limits:
    """Limits of a single request; with `ignores_system` system messages are ignored instead of refused."""

    image: ImageLimits = field(default_factory=ImageLimits)
    question_characters: int = 8192
    tokens: int = 256
    messages: int = 256
    ignores_system: bool = False


@dataclass(frozen=True)
class Offer:
    """What is served: names of the model and its method, and the default length limit of an answer.

    `blind` is why it cannot be told whether a question resembles a task; "" where it can.
    """

    models: Sequence[str]
    longest: int
    method: str = "modalprompt"
    needs_task: bool = False
    blind: str = ""


@dataclass(frozen=True)
class ChatRequest:
    """The validated fields of a request, besides its question."""

    model: str
    longest: int
    stream: bool
    include_usage: bool
    stops: tuple[str, ...] = ()
    image: Decoding | None = None
    ignored: tuple[str, ...] = ()  # parts of the request that have no effect


def read_chat(body: bytes | bytearray, offer: Offer, limits: Limits) -> tuple[ChatRequest, Question]:
    """Return what a request body asks; raises RefusedError with a sentence: what was found, what was expected."""
    whole, fields = read_fields(body, offer)
    checked.refuse_what_is_not_done(fields)
    longest = checked.longest_answer(fields, limits.tokens) or min(offer.longest, limits.tokens)
    task = checked.task_of(fields, offer.method, offer.needs_task)
    unfamiliar = checked.unfamiliar_of(fields, offer.blind)
    stream, stops = checked.flag(fields, "stream"), checked.stops(fields)
    text, image, ignored = _last_question(fields.get("messages"), whole, limits)
    plan = None if image is None else plan_image(image, limits.image)
    request = ChatRequest(fields["model"], longest, stream, checked.includes_usage(fields), stops, plan, ignored)
    return request, Question(text, image, task, unfamiliar)


def read_fields(body: bytes | bytearray, offer: Offer) -> tuple[JsonBody, dict[str, Any]]:
    """The parsed body of a request for a model of the offer, and its fields; raises RefusedError."""
    try:
        whole = JsonBody(body)
    except OverflowError as error:
        raise RefusedError(f"the body is too much to read: {error}; expected a chat request.", 413) from None
    except ValueError as error:
        raise RefusedError(f"the body is not JSON ({str(error)[:100]}); expected a chat request.") from None
    fields = whole.value
    if not isinstance(fields, dict):
        raise RefusedError(f"the body is {kind_of(fields)}; expected an object with model and messages.")
    model = fields.get("model")
    if model not in offer.models:
        raise unknown_model(model, offer.models)
    return whole, fields


def unknown_model(model: Any, models: Sequence[str]) -> RefusedError:
    """The error for a model that is not served."""
    found = model[:100] if isinstance(model, str) else kind_of(model)
    return RefusedError(
        f"model is {found!r}; expected {' or '.join(models)}.{nearest(found, models)}", 404, "model_not_found"
    )


def _quoted(role: Any) -> str:
    """A role as it was written, without the words that `shown` puts before a text."""
    return shown(role).removeprefix("the text ")


def _last_question(messages: Any, body: JsonBody, limits: Limits) -> tuple[str, bytes | None, tuple[str, ...]]:
    """The text of the last user message, its image, and the messages that have no effect."""
    if not isinstance(messages, list) or not messages:
        raise RefusedError(f"messages is {kind_of(messages)}; expected a list with at least one user message.")
    if len(messages) > limits.messages:
        raise RefusedError(f"there are {len(messages)} messages; expected at most {limits.messages}.")
    asked, ignored = [], dict[str, None]()
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            found = f"has the role {_quoted(role)}" if isinstance(message, dict) else f"is {kind_of(message)}"
            raise RefusedError(f"messages[{number}] {found}; expected a message with role {', '.join(ROLES)}.")
        if role in INSTRUCTING:
            if not limits.ignores_system:
                raise RefusedError(
                    f"messages[{number}] has the role {_quoted(role)}, which would have no effect: how questions are "
                    "answered was learned with the prompt sets. Leave it out, or serve with --ignore-system."
                )
            ignored[f"messages with role {role}"] = None
        elif role == "user":
            asked.append(message)
    if not asked or messages[-1] is not asked[-1]:
        raise RefusedError("the last message is not from the user; expected a question, role user.")
    text, image = "", None
    for place, message in enumerate(reversed(asked)):
        texts, images = parts_of(message.get("content"))
        if len(images) > 1:
            raise RefusedError(
                f"a message has {len(images)} images, and the models learned questions about one; {PARTS}."
            )
        if place == 0:
            text = checked_text(texts, body, limits.question_characters)
        if images:
            image = read_image(images[0], body)
            break
    return text, image, tuple(ignored)


def checked_text(texts: Sequence[str], body: JsonBody, most: int) -> str:
    """The question in the text parts of a message; RefusedError without one, or of more than `most` characters."""
    if any(body.is_long(text) for text in texts):
        raise RefusedError(f"the question is too long; expected at most {most} characters.", 413)
    text = "\n".join(texts)
    if not text.strip():
        raise RefusedError("the last user message has no text; expected a question.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RefusedError("the question holds half a surrogate pair; expected valid Unicode text.") from None
    if len(text) > most:
        raise RefusedError(f"the question has {len(text)} characters; expected at most {most}.", 413)
    return text


def parts_of(content: Any, expected: str = PARTS) -> tuple[list[str], list[str]]:
    """Texts and addresses of images of a message's content; RefusedError for anything else, `expected` in its words."""
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list):
        raise RefusedError(f"content is {kind_of(content)}; {expected}.")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            address = part.get("image_url")
            if isinstance(address, dict):
                address = address.get("url")
            if not isinstance(address, str):
                raise RefusedError(f"image_url has no url; {expected}.")
            images.append(address)
        else:
            found = f"the type {shown(kind)}" if isinstance(part, dict) else f"{kind_of(part)} in its place"
            raise RefusedError(f"a part of content has {found}; {expected}.")
    return texts, images
