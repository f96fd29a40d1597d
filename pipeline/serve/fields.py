"""Validation of a chat request's fields other than its messages.

Not a pydantic model: limits are options of the server, null means that a field is left out, and each message quotes
what was found; as validators these functions would be as long, and need a table from pydantic's errors to messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config.unfamiliar import UNFAMILIAR, Unfamiliar
from pipeline.serve.refusal import RefusedError, kind_of, shown

# Fields that change the meaning of a reply and are not supported.
REFUSED = ("tools", "functions", "tool_choice", "logprobs", "logit_bias", "audio", "modalities", "response_format")
# Values that some clients send explicitly and that equal the defaults here: they are accepted.
HARMLESS: dict[str, Any] = {"tool_choice": "none", "modalities": ["text"], "response_format": {"type": "text"}}
STOPS = 16
STOP_CHARACTERS = 256


def refuse_what_is_not_done(fields: Mapping[str, Any]) -> None:
    """Raise RefusedError for fields that ask for more than a short plain text."""
    for name in REFUSED:
        if fields.get(name) not in (None, [], {}, False, HARMLESS.get(name)):
            raise RefusedError(f"{name} is set; expected it to be left out: answers are short plain texts.")
    number = fields.get("n")
    if number is not None and _whole(number) != 1:
        raise RefusedError(f"n is {shown(number)}; expected the number 1: answers are greedy, so all would be equal.")


def longest_answer(fields: Mapping[str, Any], most: int) -> int | None:
    """`max_completion_tokens`, else `max_tokens`, from 1 to `most`; None when neither is given."""
    for name in ("max_completion_tokens", "max_tokens"):
        asked = fields.get(name)
        if asked is None:  # null means left out
            continue
        number = _whole(asked)
        if number is None or not 1 <= number <= most:
            raise RefusedError(f"{name} is {shown(asked)}; expected a whole number from 1 to {most}.")
        return number
    return None


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """The value of a boolean field; false when it is left out."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise RefusedError(f"{name} is {kind_of(value)}; expected true or false.")
    return value is True


def includes_usage(fields: Mapping[str, Any]) -> bool:
    """Whether a streamed reply ends with its token counts."""
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise RefusedError(f"stream_options is {kind_of(options)}; expected an object.")
    return flag(options or {}, "include_usage")


def stops(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The stop texts: `stop` is one or a list of them."""
    given = fields.get("stop")
    if given is None:
        return ()
    texts = [given] if isinstance(given, str) else given
    expected = f"expected a text, or a list of at most {STOPS} texts, of 1 to {STOP_CHARACTERS} characters each"
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RefusedError(f"stop is {kind_of(given)}{' with other than texts' * isinstance(given, list)}; {expected}.")
    if len(texts) > STOPS or not all(1 <= len(text) <= STOP_CHARACTERS for text in texts):
        lengths = [len(text) for text in texts]
        found = f"{len(texts)} texts of {min(lengths)} to {max(lengths)} characters"
        raise RefusedError(f"stop has {found}; {expected}.")
    return tuple(texts)


def task_of(fields: Mapping[str, Any], method: str, needs_task: bool) -> str | None:
    """The field `task`; refused for methods that route by themselves, where it would have no effect."""
    task = fields.get("task")
    if task is None:
        return None
    if not isinstance(task, str):
        raise RefusedError(f"task is {kind_of(task)}; expected the name of a task.")
    if not needs_task:
        raise RefusedError(
            f"task is {shown(task)}, which has no effect: method {method} finds the prompt sets by itself. Leave it "
            "out."
        )
    return task


def unfamiliar_of(fields: Mapping[str, Any], blind: str) -> Unfamiliar | None:
    """The field `unfamiliar`, for this question in place of the server's; None where it is left out.

    `blind` is why it cannot be told whether a question resembles a task; "" where it can.
    """
    mode = fields.get("unfamiliar")
    if mode is None:
        return None
    if mode not in UNFAMILIAR:
        raise RefusedError(f"unfamiliar is {shown(mode)}; expected {', '.join(UNFAMILIAR[:-1])} or {UNFAMILIAR[-1]}.")
    if blind and mode != "answer":
        raise RefusedError(f"unfamiliar is {shown(mode)}, but {blind}")
    known: Unfamiliar = mode
    return known


def _whole(value: Any) -> int | None:
    """The integer value of a JSON number (10 or 10.0); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if value == value // 1 and abs(value) < 1 << 53 else None
