"""Replies in OpenAI's format: complete, as events of a stream, and errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from pipeline.serve.request import Update


def new_id() -> str:
    """A new id of a reply."""
    return f"chatcmpl-{uuid.uuid4().hex[:24]}"


def completion(identity: str, model: str, update: Update, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """A complete reply."""
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
    """Numbers of tokens; the prompt's includes image features and prompt vectors."""
    whole = update.prompt_tokens + update.completion_tokens
    return {
        "prompt_tokens": update.prompt_tokens,
        "completion_tokens": update.completion_tokens,
        "total_tokens": whole,
    }


def about(update: Update, ignored: Sequence[str]) -> dict[str, Any]:
    """Fields beyond OpenAI's protocol: how the question came to its prompt sets, and parts of the request that had no
    effect."""
    sets = {"prompt_sets": update.chosen.to_json()}
    return {**sets, "ignored": list(ignored)} if ignored else sets


def error_body(message: str, code: str) -> dict[str, Any]:
    """An error in OpenAI's format."""
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


def _envelope(identity: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": identity, "object": kind, "created": int(time.time()), "model": model}
