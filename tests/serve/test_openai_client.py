"""The service as its users meet it: the official client against the real process."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from pipeline.adapter.answering import Question
from tests.adapters import question
from tests.serve import curl
from tests.serve.conftest import Served, address_of, start

pytestmark = pytest.mark.e2e
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


def messages(asked: Question) -> list[Any]:
    parts: list[Any] = [{"type": "text", "text": asked.text}]
    if asked.image is not None:
        url = "data:image/png;base64," + base64.b64encode(asked.image).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": parts}]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, asked: Question, **options: Any) -> Any:
    model = options.pop("model", "tiny-adapter")
    return client.chat.completions.create(model=model, messages=messages(asked), **options)


def test_an_answer_is_that_of_predict_with_its_sets_and_similarities(served: Served, client: openai.OpenAI) -> None:
    for asked in (question(0), question(1, variant=3), question(2, with_image=False)):
        expected = served.answerer.answer([asked])[0]
        reply = ask(client, asked)
        assert reply.choices[0].message.content == expected.text
        assert reply.prompt_sets["selected"] == expected.selected
        assert reply.prompt_sets["similarity"] == pytest.approx(expected.similarity, abs=1e-3)
        assert reply.prompt_sets.keys() == {"selected", "similarity"}  # sets of a learned router keep no keys
        assert reply.usage.completion_tokens <= 6 and reply.usage.prompt_tokens > 10
    assert served.answerer.answer([question(1)])[0].selected == ["T1"]


def test_a_streamed_answer_is_the_same_text_in_pieces(served: Served, client: openai.OpenAI) -> None:
    asked = question(1)
    events = list(ask(client, asked, stream=True, stream_options={"include_usage": True}))
    assert events[0].prompt_sets["selected"] == ["T1"]
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == served.answerer.answer([asked])[0].text
    assert [event.choices[0].finish_reason for event in events if event.choices][-1] in ("stop", "length")
    assert events[-1].usage.completion_tokens >= 1


def test_max_tokens_cuts_the_answer_and_says_so(client: openai.OpenAI) -> None:
    reply = ask(client, question(0), max_tokens=1)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (1, "length")


def test_an_answer_ends_at_a_stop_streamed_or_not(served: Served, client: openai.OpenAI) -> None:
    full = served.answerer.answer([question(0)])[0].text
    stop = full[2:4]
    whole = ask(client, question(0), stop=stop)
    events = list(ask(client, question(0), stop=[stop, "never"], stream=True))
    streamed = "".join(event.choices[0].delta.content or "" for event in events)
    assert whole.choices[0].message.content == streamed == full[: full.index(stop)]
    assert whole.choices[0].finish_reason == events[-1].choices[0].finish_reason == "stop"


def test_the_last_question_of_a_conversation_is_about_its_latest_image(served: Served, client: openai.OpenAI) -> None:
    asked = question(2)
    talk = [*messages(asked), {"role": "assistant", "content": "red"}, {"role": "user", "content": "and its size?"}]
    reply: Any = client.chat.completions.create(model="tiny-adapter", messages=talk)
    expected = served.answerer.answer([Question("and its size?", asked.image)])[0]
    assert reply.choices[0].message.content == expected.text


@needs_curl
def test_the_request_of_the_documentation_is_answered_by_curl(served: Served, tmp_path: Path) -> None:
    picture = question(1).image
    assert picture is not None
    reply = curl.run(curl.shown("scene.png | tr"), served.url, served.name, picture, tmp_path)
    expected = served.answerer.answer([curl.question(picture)])[0]
    assert reply["choices"][0]["message"]["content"] == expected.text
    assert reply["prompt_sets"]["selected"] == expected.selected
    (listed,) = curl.run(f"curl {curl.ADDRESS}/v1/models", served.url)["data"]
    assert listed["id"] == served.name


def test_the_model_is_listed_with_its_sets(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.model_dump()["prompt_sets"]) == ("tiny-adapter", ["T0", "T1", "T2"])
    assert client.models.retrieve("tiny-adapter") == model


def test_a_model_that_is_not_served_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny-adapter'") as error:
        client.models.retrieve("owner/tiny-adaptr")
    assert error.value.code == "model_not_found"


def test_two_hundred_clients_at_once_all_get_their_own_answer(served: Served) -> None:
    asked = [question(n % 3, variant=n % 5, with_image=n % 7 != 0) for n in range(200)]
    different = {(q.text, q.image): q for q in asked}
    known = dict(zip(different, served.answerer.answer(list(different.values())), strict=True))

    async def everybody() -> list[tuple[str, Any]]:
        async with openai.AsyncOpenAI(
            base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=300
        ) as everyone:

            async def one(number: int) -> tuple[str, Any]:
                options: Any = {"model": "tiny-adapter", "messages": messages(asked[number])}
                if number % 2:
                    reply: Any = await everyone.chat.completions.create(**options)
                    return reply.choices[0].message.content, reply.prompt_sets["selected"]
                events: list[Any] = [
                    event async for event in await everyone.chat.completions.create(**options, stream=True)
                ]
                text = "".join(event.choices[0].delta.content or "" for event in events)
                return text, events[0].prompt_sets["selected"]

            return await asyncio.gather(*map(one, range(len(asked))))

    for q, (text, selected) in zip(asked, asyncio.run(everybody()), strict=True):
        assert (text, selected) == (known[q.text, q.image].text, known[q.text, q.image].selected)
    assert numbers(served)["pipeline_serve_largest_batch"] > 4


def numbers(served: Served) -> dict[str, float]:
    with urllib.request.urlopen(f"{served.url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def bomb() -> bytes:
    """A PNG of a few hundred kilobytes that would decode to 1.2 GB."""
    buffer = io.BytesIO()
    Image.new("1", (20000, 20000)).save(buffer, "PNG")
    return buffer.getvalue()


def address(encoded: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded).decode()


@pytest.mark.parametrize(
    ("url", "sentence", "status"),
    [
        (lambda: address(bomb()), "expected at most", 413),
        (lambda: address(b"no image"), "the image is not readable", 400),
        (lambda: "data:image/png;base64,***", "not base64", 400),
        (lambda: "data:image/png,abc", "not base64", 400),
        (lambda: "http://127.0.0.1/secret.png", "addresses are not fetched", 400),
        (lambda: "file:///etc/passwd", "addresses are not fetched", 400),
    ],
)
def test_a_bad_image_is_refused_in_a_sentence(
    served: Served, client: openai.OpenAI, url: Any, sentence: str, status: int
) -> None:
    parts: Any = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url()}}]
    with pytest.raises(openai.APIStatusError, match=sentence) as error:
        client.chat.completions.create(model="tiny-adapter", messages=[{"role": "user", "content": parts}])
    assert error.value.status_code == status
    assert ask(client, question(0)).choices  # and the next one is answered


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": "tiny-adaptor"}, "Did you mean 'tiny-adapter'"),
        ({"n": 2}, "expected the number 1"),
        ({"max_tokens": 100000}, "from 1 to 256"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is set"),
        ({"extra_body": {"task": "T9"}}, "task is the text 'T9', which has no effect"),
    ],
)
def test_a_request_that_cannot_be_honoured_is_refused(
    client: openai.OpenAI, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=sentence):
        ask(client, question(0), **options)


def test_a_question_that_is_too_long_spoils_no_other(served: Served) -> None:
    async def both() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as everyone:
            asked = [question(0), Question("a" * 3000), question(1)]
            calls = [everyone.chat.completions.create(model="tiny-adapter", messages=messages(q)) for q in asked]
            return await asyncio.gather(*calls, return_exceptions=True)

    first, refused, last = asyncio.run(both())
    assert isinstance(refused, openai.BadRequestError) and "model.max_length" in str(refused)
    assert first.choices and last.choices


def raw(served: Served, head: str, body: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=30)
    connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body)
    return connection


HEAD = "POST /v1/chat/completions HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"


def test_a_huge_body_is_refused_before_it_is_read(served: Served, client: openai.OpenAI) -> None:
    with raw(served, HEAD + "Content-Length: 10000000000") as connection:
        assert b" 413 " in connection.recv(1000).splitlines()[0]
    with raw(served, HEAD + "Transfer-Encoding: chunked") as connection:
        piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        try:
            for _ in range(40):
                connection.sendall(piece)
        except OSError:
            pass  # it stopped listening
        else:
            pytest.fail("40 MB were read")
    assert ask(client, question(0)).choices


def test_slow_and_silent_callers_leave_the_others_answered(served: Served, client: openai.OpenAI) -> None:
    slow = [raw(served, HEAD + "Content-Length: 1000", b'{"model": ') for _ in range(50)]
    slow += [socket.create_connection(("127.0.0.1", served.port)) for _ in range(50)]
    try:
        assert ask(client, question(0)).choices
    finally:
        for connection in slow:
            connection.close()


def test_callers_who_leave_do_not_keep_their_place_in_the_batch(served: Served, client: openai.OpenAI) -> None:
    for _ in range(10):
        stream = ask(client, question(0), stream=True, max_tokens=200)
        next(iter(stream))
        stream.close()
    assert ask(client, question(0)).choices
    assert numbers(served)["pipeline_serve_running"] <= 1


def test_what_is_not_json_or_not_chat_is_refused(served: Served) -> None:
    cases = {
        b"{": "not JSON",
        b"[]": "expected an object",
        b'{"model": "tiny-adapter"}': "messages is missing",
        b'{"model": "tiny-adapter", "messages": [{"role": "assistant", "content": "x"}]}': "not from the user",
        b"[" * 100000: "too much to read",
        b'{"model": "tiny-adapter", "messages": [{"role": "user", "content": "\\ud800"}]}': "surrogate",
    }
    for body, sentence in cases.items():
        request = urllib.request.Request(
            f"{served.url}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=30)
        assert sentence in json.loads(error.value.read())["error"]["message"]


def test_a_page_of_another_origin_cannot_ask(served: Served) -> None:
    plain = urllib.request.Request(f"{served.url}/v1/chat/completions", b"{}", {"Content-Type": "text/plain"})
    renamed = urllib.request.Request(f"{served.url}/v1/models", headers={"Host": "attacker.example"})
    for request, status in ((plain, 415), (renamed, 400)):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(request, timeout=30)
        assert error.value.code == status


def test_who_is_told_to_stop_as_soon_as_it_listens_stops(adapter: Path) -> None:
    process = start(adapter)
    address_of(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


@pytest.mark.slow
def test_a_caller_who_left_does_not_hold_up_the_end(adapter: Path) -> None:
    process = start(adapter, "--max-tokens", "4000")
    url = address_of(process)
    body = {"model": "tiny-adapter", "messages": messages(question(0)), "max_tokens": 4000}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(TimeoutError):
        urllib.request.urlopen(request, timeout=0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(8) == 0
    assert process.stderr is not None and "graceful shutdown exceeded" not in process.stderr.read()


def test_with_a_key_only_its_holders_are_answered(adapter: Path) -> None:
    process = start(adapter, PIPELINE_API_KEY="open sesame \n")
    try:
        url = address_of(process)
        with pytest.raises(openai.AuthenticationError, match="API key"):
            openai.OpenAI(base_url=f"{url}/v1", api_key="guessed", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="open sesame").models.list().data
        with urllib.request.urlopen(f"{url}/health", timeout=30) as reply:
            assert json.loads(reply.read()) == {"status": "ok"}
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
