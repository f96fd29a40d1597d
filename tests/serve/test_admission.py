"""Before the model is asked: what is read and what is not, the memory that waits, images, and callers who leave."""

from __future__ import annotations

import asyncio
import threading

import pytest

from pipeline.adapter.answering import Answerer, Tokenised
from pipeline.data import sample
from pipeline.serve.app import Service, Settings
from pipeline.serve.request import Request, Update
from pipeline.serve.worker import Worker
from tests import tiny
from tests.adapters import COLOURS, question
from tests.serve.asgi import LEAVES, SILENCE, Caller, Scripted, chat, part, post

WHOLE = Update("red", "stop", completion_tokens=2)


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads in which an image was decoded."""
    names, decode = list[str](), sample.decode_image

    def noted(encoded: bytes) -> object:
        names.append(threading.current_thread().name)
        return decode(encoded)

    monkeypatch.setattr(sample, "decode_image", noted)
    return names


def test_a_full_queue_is_said_before_the_body_is_read(answerer: Answerer) -> None:
    worker = Worker(answerer, batch=2, queue=1)  # not started: what is submitted waits
    worker.submit(Request(question(0), 1, lambda update: None))
    caller = post(Service(worker, Settings("m")), chat())
    assert (caller.status, caller.reads) == (429, 0)
    assert "ask again" in caller.error
    assert caller.headers["retry-after"] == "1"


def test_a_body_that_does_not_arrive_in_time_is_given_up(answerer: Answerer) -> None:
    caller = post(Service(Worker(answerer, 2, 2), Settings("m", body_seconds=0.2)), part(b'{"model"', True), SILENCE)
    assert caller.status == 408
    assert "did not arrive within 0.2 seconds" in caller.error


def test_bodies_that_arrive_count_for_the_memory_of_what_waits(answerer: Answerer) -> None:
    service = Service(Worker(answerer, 2, 8), Settings("m", waiting_bytes=3000))

    async def both() -> tuple[Caller, int]:
        slow = asyncio.create_task(Caller([part(b" " * 2000, True)]).call(service))
        await asyncio.sleep(0.05)
        refused = await Caller([part(b" " * 2000, True)]).call(service)
        held = service.budget.held
        slow.cancel()
        await asyncio.wait({slow})
        return refused, held

    refused, held = asyncio.run(both())
    assert (refused.status, held, service.budget.held) == (429, 2000, 0)
    assert "ask again" in refused.error


def test_tokenised_requests_count_for_the_memory_of_what_waits_until_they_begin(answerer: Answerer) -> None:
    size = answerer.tokenise(question(0)).nbytes
    worker = Worker(answerer, 2, 8)  # not started: what is submitted waits
    service = Service(worker, Settings("m", waiting_bytes=size + size // 2))
    asked = chat(question(0).text, question(0).image)

    async def both() -> Caller:
        first = asyncio.create_task(Caller([asked]).call(service))
        while not worker.waiting:
            await asyncio.sleep(0.01)
        assert service.budget.held == size
        second = await Caller([asked]).call(service)
        worker._turn([worker._waiting.popleft()])  # the first token
        await asyncio.sleep(0.05)
        assert service.budget.held == 0
        first.cancel()
        await asyncio.wait({first})
        return second

    assert asyncio.run(asyncio.wait_for(both(), 20)).status == 429


def test_an_image_is_decoded_once_and_not_by_the_event_loop_or_the_model(
    answerer: Answerer, decodings: list[str]
) -> None:
    worker = Scripted(answerer, WHOLE)
    assert post(Service(worker, Settings("m")), chat(image=tiny.png(COLOURS[0]))).status == 200
    assert [name.rpartition("_")[0] for name in decodings] == ["read"]
    assert isinstance(worker.requests[0].question, Tokenised)


def test_a_question_gives_its_pixels_back_when_its_answer_begins(answerer: Answerer) -> None:
    worker = Worker(answerer, 2, 4)
    request = Request(answerer.tokenise(question(0)), 1, lambda update: None)
    worker._turn([request])
    assert request.question is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"task": "T9"}, "which has no effect"),
        ({"text": "a" * 3000}, "model.max_length"),
        ({"image": tiny.png(COLOURS[0])[:-30]}, "the image is not readable"),
    ],
    ids=["task", "length", "image"],
)
def test_what_cannot_be_answered_is_refused_with_its_status_streamed_or_not(
    answerer: Answerer, stream: bool, asked: dict, sentence: str
) -> None:
    service = Service(Worker(answerer, 2, 4), Settings("m"))
    caller = post(service, chat(**asked, stream=stream))
    assert caller.status == 400
    assert sentence in caller.error
    assert service.metrics.requests == {400: 1}


def test_a_caller_who_leaves_is_noticed_while_tokens_arrive(answerer: Answerer) -> None:
    tokens = [Update("a" * n, completion_tokens=n) for n in range(1, 500)]
    worker = Scripted(answerer, *tokens, seconds=0.01)
    service = Service(worker, Settings("m"))

    async def leave() -> None:
        caller = Caller([chat()])
        asked = asyncio.create_task(caller.call(service))
        while not worker.requests:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert not worker.requests[0].cancelled
        caller.gone.set()
        await asyncio.wait_for(asked, 1)

    asyncio.run(leave())
    assert worker.requests[0].cancelled
    assert service.metrics.requests == {499: 1}


def test_a_caller_who_leaves_before_the_stream_begins_is_forgotten(answerer: Answerer) -> None:
    worker = Scripted(answerer, Update("red", completion_tokens=1))
    service = Service(worker, Settings("m"))
    while_read, while_waiting = SILENCE, SILENCE
    post(service, chat(stream=True), while_read, while_waiting, LEAVES)
    assert worker.requests[0].cancelled
    assert service.metrics.requests == {499: 1}


def test_a_caller_who_leaves_gives_its_place_in_the_queue_free(answerer: Answerer) -> None:
    worker = Worker(answerer, 2, 1)
    service = Service(worker, Settings("m"))
    post(service, chat(), LEAVES)
    assert (worker.waiting, service.budget.held) == (0, 0)
    assert service.metrics.requests == {499: 1}


def test_a_caller_who_leaves_in_the_middle_of_a_body_is_counted_as_such(answerer: Answerer) -> None:
    service = Service(Worker(answerer, 2, 1), Settings("m"))
    post(service, part(b'{"model"', True), LEAVES)
    assert service.metrics.requests == {499: 1}
