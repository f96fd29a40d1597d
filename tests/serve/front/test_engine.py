"""The engine behind a front: it goes and comes back, breaks off, refuses, and may have other prompt sets."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from pipeline.adapter.answering import Answerer
from tests.serve.front.conftest import Asked, Fronts
from tests.serve.front.fake_engine import FakeEngine
from tests.serve.front.test_front import ASKED, events_of
from tests.serve.test_openai_client import messages


def test_an_engine_that_goes_down_is_503_and_answers_again_once_it_is_back(asked: Asked, engine: FakeEngine) -> None:
    assert asked.client.get("/health").json() == {"status": "ok"}
    assert asked.post(messages=messages(ASKED[0])).status_code == 200
    engine.down()
    gone = asked.post(messages=messages(ASKED[0]))
    assert (gone.status_code, gone.json()["error"]["code"]) == (503, "server_error")
    assert f"the engine at {engine.url} is not reachable" in gone.json()["error"]["message"]
    health = asked.client.get("/health")
    assert health.status_code == 503 and "is not reachable" in health.json()["status"]
    assert "pipeline_serve_engine_up 0" in asked.client.get("/metrics").text
    engine.up()
    assert asked.post(messages=messages(ASKED[0])).status_code == 200
    assert asked.client.get("/health").status_code == 200


def test_a_stream_that_the_engine_breaks_off_ends_with_an_error(
    asked: Asked, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.breaks_after = 2
    with caplog.at_level(logging.INFO, "pipeline.serve"):
        found = events_of(asked.post(messages=messages(ASKED[0]), stream=True).text)
    assert "is not reachable" in found[-1]["error"]["message"] and len(found) == 3
    assert ", 503, " in caplog.records[-1].getMessage()
    engine.breaks_after = None
    assert asked.post(messages=messages(ASKED[0])).status_code == 200


def test_an_answer_that_never_comes_because_the_engine_is_killed_is_503(asked: Asked, engine: FakeEngine) -> None:
    assert asked.client.get("/health").status_code == 200
    engine.seconds = 20
    threading.Timer(0.5, engine.down).start()
    began = time.monotonic()
    assert asked.post(messages=messages(ASKED[0])).status_code == 503
    assert time.monotonic() - began < 10


def test_an_engine_with_another_checkpoint_is_not_asked(asked: Asked, engine: FakeEngine, answerer: Answerer) -> None:
    original = engine.processor.chat_template
    engine.processor.chat_template = original.replace(asked.front.engine.behind.form.identity, "0123456789abcdef")
    reply = asked.post(messages=messages(ASKED[0]))
    assert reply.status_code == 503 and "has other prompt sets" in reply.json()["error"]["message"]
    engine.processor.chat_template = answerer.lmm.conversation.processor.chat_template
    reply = asked.post(messages=messages(ASKED[0]))
    assert reply.status_code == 503 and "serves a model without prompt sets" in reply.json()["error"]["message"]
    assert not engine.questions()
    engine.processor.chat_template = original
    assert asked.post(messages=messages(ASKED[0])).status_code == 200
    engine.processor.chat_template = original.replace(asked.front.engine.behind.form.identity, "0123456789abcdef")
    reply = asked.post(messages=messages(ASKED[0]))  # replaced while nobody asked: the template itself refuses
    assert reply.status_code == 503 and "has other prompt sets" in reply.json()["error"]["message"]


def test_requests_that_arrive_together_verify_the_engine_once(asked: Asked, engine: FakeEngine) -> None:
    threads = [threading.Thread(target=asked.post, kwargs={"messages": messages(ASKED[0])}) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(engine.asked) - len(engine.questions()) == 2  # another identity, and the right one
    assert len(engine.questions()) == 6


@pytest.mark.parametrize(
    ("status", "expected", "sentence"),
    [
        (400, 400, "max_tokens is too large"),
        (422, 422, "max_tokens is too large"),
        (429, 429, "max_tokens is too large"),
        (500, 500, "max_tokens is too large"),
        (401, 503, "expected PIPELINE_ENGINE_KEY to be the key"),
        (404, 503, "the engine has changed"),
    ],
)
def test_a_refusal_of_the_engine_is_passed_on(
    asked: Asked, engine: FakeEngine, status: int, expected: int, sentence: str
) -> None:
    engine.refuses = (status, "max_tokens is too large")
    for stream in (False, True):
        reply = asked.post(messages=messages(ASKED[0]), stream=stream)
        assert reply.status_code == expected and sentence in reply.json()["error"]["message"]


def test_the_engine_gets_its_own_key_and_never_a_clients(fronts: Fronts, engine: FakeEngine) -> None:
    guarded = fronts(api_key="client-secret", key="engine-secret")
    assert guarded.post(messages=messages(ASKED[0])).status_code == 401
    guarded.client.headers["authorization"] = "Bearer client-secret"
    assert guarded.post(messages=messages(ASKED[0])).status_code == 200
    assert {*engine.keys} == {"Bearer engine-secret"}
