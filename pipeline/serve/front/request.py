"""Reads chat requests that go on to an engine: what routing needs of them, and the body that the engine gets.

The engine answers the whole conversation, so more is allowed than the own engine can do: several images, system and
tool messages, tools, formats, sampling. What would reach prompt sets, files or other machines past routing is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.adapter.answer import Chosen
from pipeline.adapter.choosing import Question
from pipeline.serve import fields as checked
from pipeline.serve.chat import INSTRUCTING, ROLES, ChatRequest, Limits, Offer, checked_text, parts_of, read_fields
from pipeline.serve.front.form import RESERVED, TEMPLATE, SetForm
from pipeline.serve.images import plan_image, read_image
from pipeline.serve.json_body import JsonBody
from pipeline.serve.refusal import RefusedError, kind_of, shown

TOLD = (*ROLES, "tool", "function")
PARTS = "expected text, or a list of parts {type: text, text} and {type: image_url, image_url: {url}}"
OWN = ("task", "unfamiliar")  # fields that routing reads and the engine does not know


@dataclass(frozen=True)
class Forwarded:
    """A chat request that goes on: `asked` and `question` are what is read of it here."""

    asked: ChatRequest
    question: Question
    fields: dict[str, Any]
    body: JsonBody

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.body.nbytes + len(self.question.image or b"")

    def written(self, model: str, chosen: Chosen, form: SetForm) -> bytes:
        """The body for the engine, which calls the model `model`, with the chosen sets in this form.

        Answers are greedy and as long as the tasks' longest, as those of the own engine, where the request does not say
        otherwise. Several answers (`n`) are sampled: greedy ones would be equal, and vLLM refuses them.
        """
        fields = {name: value for name, value in self.fields.items() if name not in OWN and value is not None}
        kept = (one for one in fields["messages"] if not (self.asked.ignored and one["role"] in INSTRUCTING))
        fields["messages"] = [_as_learned(message, self.body) for message in kept]
        if not {"max_tokens", "max_completion_tokens"} & fields.keys():
            fields["max_tokens"] = self.asked.longest
        if fields.get("n", 1) == 1:
            fields.setdefault("temperature", 0)
        fields["model"] = model
        form.write(fields, chosen.selected)
        return self.body.written(fields)


def read_forwarded(body: bytes | bytearray, offer: Offer, limits: Limits) -> Forwarded:
    """Read a request's body; raises RefusedError with a sentence: what was found, what was expected."""
    whole, fields = read_fields(body, offer)
    _refuse_detours(fields)
    longest = checked.longest_answer(fields, limits.tokens) or min(offer.longest, limits.tokens)
    task = checked.task_of(fields, offer.method, offer.needs_task)
    unfamiliar = checked.unfamiliar_of(fields, offer.blind)
    stream, usage = checked.flag(fields, "stream"), checked.includes_usage(fields)
    text, images, ignored = _read_messages(fields.get("messages"), whole, limits)
    encoded = None
    plan = None
    for address in images:  # all are checked, because the engine decodes all of them
        encoded = read_image(address, whole)
        plan = plan_image(encoded, limits.image)
    asked = ChatRequest(fields["model"], longest, stream, usage, (), plan, ignored)
    return Forwarded(asked, Question(text, encoded, task, unfamiliar), fields, whole)


def _as_learned(message: dict[str, Any], body: JsonBody) -> dict[str, Any]:
    """A message with its image before its one text, as the sets have learned questions and the own engine reads them.

    Chat templates print parts in their order. Messages with several images, or of others than the user, stay as they
    are, and so do texts that are too long to be parsed.
    """
    content = message.get("content")
    if message["role"] != "user" or not isinstance(content, list):
        return message
    images = [part for part in content if part["type"] == "image_url"]
    texts = [part["text"] for part in content if part["type"] == "text"]
    if len(images) > 1 or (len(texts) > 1 and any(map(body.is_long, texts))):
        return message
    return {**message, "content": [*images, *([{"type": "text", "text": "\n".join(texts)}] if texts else [])]}


def _refuse_detours(fields: Mapping[str, Any]) -> None:
    """Raise RefusedError for fields that would choose prompt sets, or their places, past routing."""
    if fields.get("chat_template") is not None:
        raise RefusedError("chat_template is set; expected it to be left out: the checkpoint's own places prompt sets.")
    arguments = fields.get(TEMPLATE)
    if arguments is not None and not isinstance(arguments, dict):
        raise RefusedError(f"{TEMPLATE} is {kind_of(arguments)}; expected an object.")
    for name in RESERVED:
        if name in (arguments or {}):
            raise RefusedError(f"{TEMPLATE} has {name}; expected it to be left out: routing chooses the prompt sets.")


def _read_messages(messages: Any, body: JsonBody, limits: Limits) -> tuple[str, list[str], tuple[str, ...]]:
    """The text of the last user message; the addresses of all images, last the one that routing looks at; and the
    messages that are left out.

    Routing looks at the last image of the latest user message that has one, as the own engine does.
    """
    if not isinstance(messages, list) or not messages:
        raise RefusedError(f"messages is {kind_of(messages)}; expected a list with at least one user message.")
    if len(messages) > limits.messages:
        raise RefusedError(f"there are {len(messages)} messages; expected at most {limits.messages}.")
    text: str | None = None
    seen, others, ignored = list[str](), list[str](), dict[str, None]()
    for number, message in enumerate(reversed(messages)):
        place = len(messages) - 1 - number
        role = message.get("role") if isinstance(message, dict) else None
        if role not in TOLD:
            found = f"has the role {shown(role)}" if isinstance(message, dict) else f"is {kind_of(message)}"
            raise RefusedError(f"messages[{place}] {found}; expected a message with role {', '.join(TOLD)}.")
        if role in INSTRUCTING and limits.ignores_system:
            ignored[f"messages with role {role}"] = None
            continue
        content = message.get("content")
        if content is None and role != "user":  # as of an assistant that called tools
            continue
        texts, images = parts_of(content, PARTS)
        if role != "user":
            others += images
            continue
        if text is None:
            text = checked_text(texts, body, limits.question_characters)
        if seen:
            others += images
        else:
            seen = images
    if text is None:
        raise RefusedError("no message is from the user; expected a question, role user.")
    return text, [*others, *seen], tuple(ignored)
