"""Fields of a chat request that clients send in several ways, and numbers that stay whole."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from pipeline.answering import Question
from pipeline.serve.chat import ChatRequest, Limits, RefusedError, read_chat, read_image
from pipeline.serve.metrics import Metrics
from tests import tiny
from tests.adapters import COLOURS


def read(**fields: Any) -> tuple[ChatRequest, Question]:
    body = {"model": "m", "messages": [{"role": "user", "content": "what?"}], **fields}
    return read_chat(json.dumps(body).encode(), ["m"], 6, Limits())


def test_a_limit_of_null_leaves_the_other_name_of_it_valid() -> None:
    assert read(max_completion_tokens=None, max_tokens=3)[0].longest == 3
    assert read(max_completion_tokens=2, max_tokens=3)[0].longest == 2
    assert read(max_completion_tokens=None)[0].longest == 6


@pytest.mark.parametrize(
    "fields", [{"modalities": ["text"]}, {"tool_choice": "none"}, {"response_format": {"type": "text"}}, {"tools": []}]
)
def test_what_asks_for_plain_text_is_no_reason_to_refuse(fields: dict[str, Any]) -> None:
    assert read(**fields)[1].text == "what?"


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"modalities": ["text", "audio"]}, "modalities is set"),
        ({"tool_choice": "required"}, "tool_choice is set"),
        ({"stream": "yes"}, "stream is text; expected true or false"),
        ({"stream": 1}, "stream is a number; expected true or false"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence) as error:
        read(**fields)
    assert error.value.status == 400


def test_a_stream_of_null_is_none() -> None:
    assert not read(stream=None)[0].stream
    assert read(stream=True)[0].stream


def test_base64_may_be_broken_into_lines() -> None:
    image = tiny.png(COLOURS[0])
    broken = base64.encodebytes(image).decode()
    assert broken.count("\n") > 1
    assert read_image(f"data:image/png;base64,{broken}", Limits()) == image


def test_counters_keep_all_their_digits() -> None:
    assert "pipeline_serve_tokens_total 1234567\n" in Metrics().text({}, {"tokens_total": 1234567})
