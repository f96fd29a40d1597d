"""Answers that end before a text of the caller's: whole and streamed."""

from __future__ import annotations

import pytest

from pipeline.adapter.answering import Answerer
from pipeline.serve.decoder import Running, RunningBatch, before_stops
from pipeline.serve.reply import following
from pipeline.serve.request import Update
from tests.adapters import question


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\ntwo", ["\n"], ("one", True)),
        ("one two three", ["three", "two"], ("one ", True)),
        ("one", ["two"], ("one", False)),
        ("one", [], ("one", False)),
    ],
)
def test_the_text_ends_before_the_first_stop_in_it(text: str, stops: list[str], expected: tuple[str, bool]) -> None:
    assert before_stops(text, stops) == expected


def test_an_answer_ends_at_its_stop_and_others_do_not(answerer: Answerer) -> None:
    full = answerer.answer([question(0)])[0].text
    assert len(full) > 3
    batch = RunningBatch(answerer)
    stopped, other = Running(0, 6, (full[2:4],)), Running(1, 6)
    batch.begin(answerer.route([question(0), question(0)]), [stopped, other])
    while batch.rows:
        batch.step()
    assert (stopped.text, stopped.finish) == (full[: full.index(full[2:4])], "stop")
    assert other.text == full
    assert len(stopped.tokens) < len(other.tokens)


@pytest.mark.parametrize(
    ("texts", "stop", "expected"),
    [
        (["one", "one\nQ", "one\nQuestion", "one\nQuestion here"], "\nQuestion:", "one\nQuestion here"),
        (["one", "one\nQ", "one\nQuestion", "one"], "\nQuestion:", "one"),
        (["aab", "aabaab", "aabaabX"], "aabaabY", "aabaabX"),
    ],
)
def test_a_stream_sends_nothing_of_a_stop(texts: list[str], stop: str, expected: str) -> None:
    sent = ""
    for number, text in enumerate(texts, start=1):
        sent += following(sent, Update(text, "stop" if number == len(texts) else None), [stop])
        if number < len(texts):
            assert expected.startswith(sent)
    assert sent == expected
