"""Fields of a chat request that clients send in several ways, and numbers that stay whole."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from pipeline.adapter.answering import Question
from pipeline.serve.chat import ChatRequest, Limits, Offer, read_chat
from pipeline.serve.images import read_image
from pipeline.serve.json_body import JsonBody
from pipeline.serve.metrics import Metrics
from pipeline.serve.refusal import RefusedError
from tests import tiny
from tests.adapters import COLOURS

USER = {"role": "user", "content": "what?"}
LIMITS, OFFER = Limits(), Offer(["m"], 6)


def read(limits: Limits = LIMITS, offer: Offer = OFFER, **fields: Any) -> tuple[ChatRequest, Question]:
    body = {"model": "m", "messages": [USER], **fields}
    return read_chat(json.dumps(body).encode(), offer, limits)


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
    assert read_image(f"data:image/png;base64,{broken}", JsonBody(b"{}")) == image


@pytest.mark.parametrize("escape", ["\\/", "\\u002f", "\\u002F"], ids=["slash", "lower", "upper"])
@pytest.mark.parametrize("kilobytes", [1, 400], ids=["short", "long"])
def test_base64_may_be_escaped_as_json_encoders_do(escape: str, kilobytes: int) -> None:
    image = bytes(range(256)) * 4 * kilobytes
    address = "data:image/png;base64," + base64.b64encode(image).decode()
    assert "/" in address and "+" in address
    body = JsonBody(f'{{"url": "{address}"}}'.replace("/", escape).replace("+", "\\u002B").encode())
    assert read_image(body.value["url"], body) == image


@pytest.mark.parametrize(
    ("fields", "longest"), [({"max_tokens": 10.0}, 10), ({"max_tokens": 7, "n": 1.0}, 7), ({"n": None}, 6)]
)
def test_a_whole_number_may_be_written_as_a_float(fields: dict[str, Any], longest: int) -> None:
    assert read(**fields)[0].longest == longest


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"max_tokens": "10"}, "max_tokens is the text '10'; expected a whole number from 1 to 256."),
        ({"max_tokens": 10.5}, "max_tokens is 10.5; expected a whole number"),
        ({"max_tokens": True}, "max_tokens is true; expected a whole number"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0; expected a whole number"),
        ({"max_tokens": float("inf")}, "max_tokens is inf; expected a whole number"),
        ({"n": "1"}, "n is the text '1'; expected the number 1"),
        ({"n": 2}, "n is 2; expected the number 1"),
        ({"n": True}, "n is true; expected the number 1"),
        ({"stream_options": "usage"}, "stream_options is text; expected an object"),
        ({"logit_bias": {"5": 10}}, "logit_bias is set"),
        ({"stop": 5}, "stop is a number; expected a text"),
        ({"stop": ["a", 5]}, "stop is a list with other than texts"),
        ({"stop": ""}, "stop has 1 texts of 0 to 0 characters"),
        ({"stop": ["a"] * 17}, "stop has 17 texts"),
    ],
)
def test_what_was_found_is_told_from_what_was_expected(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedError) as error:
        read(**fields)
    assert sentence in str(error.value)


@pytest.mark.parametrize("stop", ["\n", ["\n"], None])
def test_stops_are_a_text_or_a_list(stop: Any) -> None:
    assert read(stop=stop)[0].stops == (("\n",) if stop else ())


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_message_is_refused_or_said_to_be_ignored(role: str) -> None:
    messages = [{"role": role, "content": "Answer only in French."}, USER]
    with pytest.raises(RefusedError, match=rf"messages\[0\] has the role '{role}', .* --ignore-system"):
        read(messages=messages)
    asked, question = read(Limits(ignores_system=True), messages=messages)
    assert asked.ignored == (f"messages with role {role}",)
    assert question.text == "what?"


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"role": "robot", "content": "?"}, "the role 'robot'"),
        ({"role": "tool", "content": "?"}, "the role 'tool'"),
        ({"content": "?"}, "the role null"),
        ("what?", "is text"),
    ],
)
def test_an_unknown_role_is_refused(message: Any, found: str) -> None:
    with pytest.raises(RefusedError, match=rf"messages\[0\] .*{found}; expected a message with role user"):
        read(messages=[message, USER])


def test_a_task_is_heard_where_the_method_is_told_it_and_refused_where_it_has_no_effect() -> None:
    assert read(offer=Offer(["m"], 6, "independent", True), task="T1")[1].task == "T1"
    with pytest.raises(RefusedError, match="task is the text 'T1', which has no effect: method modalprompt"):
        read(task="T1")


def test_several_images_are_refused_with_a_reason() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    with pytest.raises(RefusedError, match="has 2 images, and the models learned questions about one"):
        read(messages=[{"role": "user", "content": [{"type": "text", "text": "?"}, part, part]}])


@pytest.mark.parametrize("address", ["http://10.0.0.1/a.png", "file:///etc/passwd", "/etc/passwd", ""])
def test_addresses_and_paths_are_neither_fetched_nor_opened(address: str) -> None:
    part = {"type": "image_url", "image_url": {"url": address}}
    with pytest.raises(RefusedError, match="expected a data URI"):
        read(messages=[{"role": "user", "content": [{"type": "text", "text": "?"}, part]}])


def test_counters_keep_all_their_digits() -> None:
    assert "pipeline_serve_tokens_total 1234567\n" in Metrics().text({}, {"tokens_total": 1234567})
