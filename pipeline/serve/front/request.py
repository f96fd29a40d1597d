"""Reads chat requests that go on to an engine: what routing needs of them, and the body that the engine gets.

The engine answers the whole conversation, so more is allowed than the own engine can do: several images, system and
tool messages, tools, formats, sampling. What would reach prompt sets, files or other machines past routing is refused.

Messages are first written anew, with the texts and images alone that were found in them (`_as_sent`). Routing reads
these, so it cannot see anything else than the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    """A chat request that goes on: `asked` and `question` are what is read of it here, `fields` has what is sent."""

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
        if not {"max_tokens", "max_completion_tokens"} & fields.keys():
            fields["max_tokens"] = self.asked.longest
        if fields.get("n", 1) == 1:
            fields.setdefault("temperature", 0)
        fields["model"] = model
        form.write(fields, chosen.selected)
        return self.body.written(fields)


def read_forwarded(body: bytes | bytearray, offer: Offer, limits: Limits, form: SetForm) -> Forwarded:
    """Read a request's body; raises RefusedError with a sentence: what was found, what was expected.

    `form` says what no text may contain, and which fields cannot go on.
    """
    whole, fields = read_fields(body, offer)
    _refuse_detours(fields, form)
    longest = checked.longest_answer(fields, limits.tokens) or min(offer.longest, limits.tokens)
    task = checked.task_of(fields, offer.method, offer.needs_task)
    unfamiliar = checked.unfamiliar_of(fields, offer.blind)
    stream, usage = checked.flag(fields, "stream"), checked.includes_usage(fields)
    messages, ignored = _sent_messages(fields.get("messages"), whole, limits, form.hidden)
    text, images = _routed_by(messages, whole, limits)
    encoded = None
    plan = None
    for address in images:  # all are checked, because the engine decodes all of them
        encoded = read_image(address, whole)
        plan = plan_image(encoded, limits.image)
    asked = ChatRequest(fields["model"], longest, stream, usage, (), plan, ignored)
    return Forwarded(asked, Question(text, encoded, task, unfamiliar), {**fields, "messages": messages}, whole)


def _sent_messages(
    messages: Any, body: JsonBody, limits: Limits, hidden: tuple[str, str]
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The messages that the engine gets, and those that are left out; raises RefusedError."""
    if not isinstance(messages, list) or not messages:
        raise RefusedError(f"messages is {kind_of(messages)}; expected a list with at least one user message.")
    if len(messages) > limits.messages:
        raise RefusedError(f"there are {len(messages)} messages; expected at most {limits.messages}.")
    sent, ignored = list[dict[str, Any]](), dict[str, None]()
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in TOLD:
            found = f"has the role {shown(role)}" if isinstance(message, dict) else f"is {kind_of(message)}"
            raise RefusedError(f"messages[{place}] {found}; expected a message with role {', '.join(TOLD)}.")
        if role in INSTRUCTING and limits.ignores_system:
            ignored[f"messages with role {role}"] = None
        elif message.get("content") is None and role != "user":  # as of an assistant that called tools
            sent.append(message)
        else:
            sent.append({**message, "content": _as_sent(role, message.get("content"), body, hidden)})
    return sent, tuple(ignored)


def _as_sent(role: str, content: Any, body: JsonBody, hidden: tuple[str, str]) -> str | list[dict[str, Any]]:
    """A message's content with nothing in it but the texts and the data URIs of images that are checked here.

    Further keys of a part are left out: an engine may read it by them in another way than by its type, or take an
    image for another one. Texts that are too long to be parsed keep what is hidden, which the chat template replaces.

    Of the user's messages spaces at the ends are left out, and the image goes before the one text, as the sets have
    learned questions and the own engine reads them: chat templates print parts in their order. Parts of messages with
    several images stay where they are.
    """
    texts, images = parts_of(content, PARTS)
    texts = [text.replace(*hidden) for text in texts]
    plain = role == "user" and len(images) <= 1 and not (len(texts) > 1 and any(map(body.is_long, texts)))
    if plain:
        texts = ["\n".join(texts).strip()] if texts else []
    if isinstance(content, str):
        return texts[0]
    text_parts = [{"type": "text", "text": text} for text in texts]
    image_parts = [{"type": "image_url", "image_url": {"url": address}} for address in images]
    if plain:
        return [*image_parts, *text_parts]
    left: dict[str, Iterator[dict[str, Any]]] = {"text": iter(text_parts), "image_url": iter(image_parts)}
    return [next(left[part["type"]]) for part in content]


def _routed_by(messages: Sequence[dict[str, Any]], body: JsonBody, limits: Limits) -> tuple[str, list[str]]:
    """The text of the last user message, and the addresses of all images, last the one that routing looks at.

    Routing looks at the last image of the latest user message that has one, as the own engine does.
    """
    text: str | None = None
    seen, others = list[str](), list[str]()
    for message in reversed(messages):
        texts, images = parts_of(message.get("content") or [], PARTS)
        if message["role"] != "user":
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
    return text, [*others, *seen]


def _refuse_detours(fields: Mapping[str, Any], form: SetForm) -> None:
    """Raise RefusedError for fields that would choose prompt sets, or their places, past routing."""
    if fields.get("chat_template") is not None:
        raise RefusedError("chat_template is set; expected it to be left out: the checkpoint's own places prompt sets.")
    for name in form.refused:
        if fields.get(name) is not None:
            raise RefusedError(f"{name} is set; expected it to be left out: it could name the tokens of a prompt set.")
    arguments = fields.get(TEMPLATE)
    if arguments is not None and not isinstance(arguments, dict):
        raise RefusedError(f"{TEMPLATE} is {kind_of(arguments)}; expected an object.")
    for name in RESERVED:
        if name in (arguments or {}):
            raise RefusedError(f"{TEMPLATE} has {name}; expected it to be left out: routing chooses the prompt sets.")
