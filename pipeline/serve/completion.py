"""Replies in OpenAI's form: whole, as events of a stream, and as errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from pipeline.serve.request import Update


def new_id() -> str:
    """An id for a reply."""
    return f"chatcmpl-{uuid.uuid4().hex[:24]}"


def completion(identity: str, model: str, update: Update, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """The whole reply."""
    message = {"role": "assistant", "content": update.text}
    return {
        **_envelope(identity, model, "chat.completion"),
        "choices": [{"index": 0, "message": message, "finish_reason": update.finish, "logprobs": None}],
        "usage": usage(update),
        **about(update, ignored),
    }


def chunk(identity: str, model: str, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    """One event of a streamed reply."""
    choices = [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]
    return {**_envelope(identity, model, "chat.completion.chunk"), "choices": choices}


def usage(update: Update) -> dict[str, int]:
    """Numbers of tokens; those of the prompt count image and prompt vectors."""
    whole = update.prompt_tokens + update.completion_tokens
    return {
        "prompt_tokens": update.prompt_tokens,
        "completion_tokens": update.completion_tokens,
        "total_tokens": whole,
    }


def about(update: Update, ignored: Sequence[str]) -> dict[str, Any]:
    """What a reply says beyond OpenAI's protocol: the prompt sets that answered, and what had no effect, if anything.

    `similarity` is the question's to each set: where all are low, no set was made for such a question. `weights` are
    those of the selected sets, where the rule weighs them.
    """
    chosen: dict[str, Any] = {"selected": update.selected, "similarity": update.similarity}
    sets = {"prompt_sets": chosen if update.weights is None else {**chosen, "weights": update.weights}}
    return {**sets, "ignored": list(ignored)} if ignored else sets


def error_body(message: str, code: str) -> dict[str, Any]:
    """An error as the protocol has it."""
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


def _envelope(identity: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}
