"""What a reply sends: pieces of a stream that add up to the answer, the status, the end."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.adapter.answer import Chosen
from pipeline.adapter.answering import Answerer
from pipeline.serve.app import Service, Settings
from pipeline.serve.reply import following
from pipeline.serve.request import Update
from tests.serve.asgi import Caller, Scripted, chat, post


def streamed(answerer: Answerer, *updates: Update) -> Caller:
    return post(Service(Scripted(answerer, *updates, seconds=0.05), Settings("m")), chat(stream=True))


def events(caller: Caller) -> list[Any]:
    lines = caller.body.split("\n\n")
    assert lines.pop() == "" and lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def text_of(found: list[Any]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in found)


@pytest.mark.parametrize(
    "texts",
    [
        ["I", "I do", "I do n", "I do n'", "I don't", "I don't know"],
        ["so", "so.", "so. '", "so.'a", "so.'a word"],
        ["caf\ufffd", "café"],
        ["红", "红色", "红色的"],
        ["abcdefgh", "Abcdefgh and more"],  # of which no rule is known
    ],
)
def test_the_pieces_of_a_stream_add_up_to_the_answer(texts: list[str]) -> None:
    sent, pieces = "", list[str]()
    for number, text in enumerate(texts, start=1):
        pieces.append(following(sent, Update(text, "stop" if number == len(texts) else None)))
        sent += pieces[-1]
    if texts[0] == "abcdefgh":
        assert sent.endswith(texts[-1])  # nothing is lost, though what was sent cannot be taken back
    else:
        assert sent == texts[-1]
    assert "\ufffd" not in sent


def test_long_words_and_scripts_without_spaces_are_sent_as_they_come() -> None:
    assert following("", Update("红色")) == "红色"
    assert following("two ", Update("two large")) == "large"


def test_a_stream_is_neither_cached_nor_buffered(answerer: Answerer) -> None:
    caller = streamed(answerer, Update("red", "stop", completion_tokens=1))
    assert caller.headers["content-type"].startswith("text/event-stream")
    assert (caller.headers["cache-control"], caller.headers["x-accel-buffering"]) == ("no-cache", "no")


def test_a_stream_has_the_answer_and_its_end(answerer: Answerer) -> None:
    finished = Update("large red", "stop", chosen=Chosen(["T1"]))
    found = events(streamed(answerer, Update("large", completion_tokens=1), finished))
    assert text_of(found) == "large red"
    assert found[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_request_that_fails_before_its_first_token_has_a_status_even_when_streamed(answerer: Answerer) -> None:
    caller = streamed(answerer, Update(finish="failed", error="the model failed."))
    assert (caller.status, caller.error) == (500, "the model failed.")


def test_a_stream_that_fails_on_its_way_says_so_and_ends(answerer: Answerer) -> None:
    failing = Update(finish="failed", error="the model failed.")
    found = events(streamed(answerer, Update("large", completion_tokens=1), failing))
    assert found[-1]["error"]["message"] == "the model failed."


def test_a_stopping_server_is_told_as_unavailable(answerer: Answerer) -> None:
    assert streamed(answerer, Update(finish="stopped", error="the server is stopping.")).status == 503
