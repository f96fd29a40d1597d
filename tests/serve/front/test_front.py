"""The front before an engine: sets are chosen here, requests and replies pass unchanged."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.vocabulary.tokens import MARK, token_text
from pipeline.serve.chat import Limits
from pipeline.serve.front.form import RESERVED
from tests import tiny
from tests.adapter.vocabulary import photo
from tests.adapters import COLOURS, LENGTH, question
from tests.serve.front.conftest import Asked, Fronts
from tests.serve.front.fake_engine import FakeEngine
from tests.serve.test_openai_client import messages

PICTURE = "data:image/png;base64," + base64.b64encode(tiny.png(COLOURS[0])).decode()
PICTURE_PART = {"type": "image_url", "image_url": {"url": PICTURE}}
ASKED = [question(0), question(1, variant=3), question(2, with_image=False), question(2, variant=1)]


def events_of(text: str) -> list[Any]:
    contents = [part.removeprefix("data: ") for part in text.split("\n\n") if part]
    assert contents[-1] == "[DONE]"
    return [json.loads(content) for content in contents[:-1]]


@pytest.mark.parametrize("number", range(len(ASKED)))
def test_an_answer_is_that_of_the_own_engine_with_its_sets_and_similarities(
    asked: Asked, engine: FakeEngine, answerer: Answerer, number: int
) -> None:
    expected = answerer.answer([ASKED[number]])[0]
    reply = asked.post(messages=messages(ASKED[number]))
    assert reply.status_code == 200, reply.text
    content = reply.json()
    assert content["choices"][0]["message"]["content"].strip() == expected.text
    assert content["model"] == "m"
    assert content["prompt_sets"]["selected"] == expected.selected
    assert content["prompt_sets"]["similarity"] == pytest.approx(expected.similarity, abs=1e-3)
    sent = engine.questions()[-1]
    assert sent["chat_template_kwargs"]["prompt_sets"] == expected.selected
    assert (sent["max_tokens"], sent["temperature"], sent["model"]) == (6, 0, "engine-name")


def test_a_streamed_answer_is_the_same_text_and_its_first_event_has_the_sets(asked: Asked, answerer: Answerer) -> None:
    expected = answerer.answer([ASKED[1]])[0]
    reply = asked.post(messages=messages(ASKED[1]), stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = events_of(reply.text)
    assert found[0]["prompt_sets"]["selected"] == expected.selected
    assert not any("prompt_sets" in piece for piece in found[1:])
    assert "".join(c["delta"].get("content", "") for p in found for c in p["choices"]).strip() == expected.text
    assert {piece["model"] for piece in found} == {"m"}
    assert found[-1]["usage"]["completion_tokens"] == 6


def test_what_the_engine_understands_is_passed_on_unchanged(asked: Asked, engine: FakeEngine) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    given = {
        "stop": ["\n", "."],
        "response_format": {"type": "json_object"},
        "n": 2,
        "tools": tools,
        "tool_choice": "auto",
        "logprobs": True,
        "top_logprobs": 3,
        "seed": 7,
        "max_completion_tokens": 5,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first?"},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": [PICTURE_PART, {"type": "text", "text": "second?"}]},
    ]
    reply = asked.post(messages=turns, task=None, **given)
    assert reply.status_code == 200, reply.text
    assert len(reply.json()["choices"]) == 2
    sent = engine.questions()[-1]
    assert sent.pop("chat_template_kwargs").pop("enable_thinking") is False
    assert sent.pop("messages") == turns
    del given["chat_template_kwargs"]
    assert sent == {**given, "model": "engine-name"}  # several answers are sampled, so no temperature is added


def test_a_long_image_reaches_the_engine_as_it_was_written(asked: Asked, engine: FakeEngine) -> None:
    noise = photo(300, 200)
    written = messages(Question("what is it?", noise))
    assert len(base64.b64encode(noise)) > 1 << 17  # beyond it the text is not parsed, see `json_body`
    assert asked.post(messages=written).status_code == 200
    assert engine.questions()[-1]["messages"][0]["content"] == written[0]["content"][::-1]


def test_an_image_goes_before_the_text_as_questions_were_learned(asked: Asked, engine: FakeEngine) -> None:
    """Several images stay where they are: no set has learned such questions."""
    parts = [{"type": "text", "text": "first"}, PICTURE_PART, {"type": "text", "text": "second"}]
    engine.refuses = (400, "what is sent is what counts here")
    turns = [{"role": "user", "content": [*parts, PICTURE_PART]}, {"role": "user", "content": parts}]
    asked.post(messages=turns)
    several, one = engine.questions()[-1]["messages"]
    assert several == turns[0]
    assert one["content"] == [PICTURE_PART, {"type": "text", "text": "first\nsecond"}]


def test_the_last_user_message_routes_and_the_latest_image_before_it(asked: Asked, answerer: Answerer) -> None:
    first, last = question(0), question(1, with_image=False)
    turns = [*messages(first), {"role": "assistant", "content": "red"}, *messages(last)]
    reply = asked.post(messages=turns).json()
    expected = answerer.answer([Question(last.text, first.image)])[0]
    assert reply["prompt_sets"]["similarity"] == pytest.approx(expected.similarity, abs=1e-3)


def test_after_a_tools_result_the_question_of_the_user_still_routes(asked: Asked, engine: FakeEngine) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    turns = [
        *messages(question(1, with_image=False)),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "a result"},
    ]
    engine.refuses = (400, "this fake knows no tools")  # what is sent is what counts here
    asked.post(messages=turns)
    assert engine.questions()[-1]["messages"] == turns
    assert engine.questions()[-1]["chat_template_kwargs"]["prompt_sets"] == ["T1"]


def test_system_messages_are_left_out_where_the_service_ignores_them(fronts: Fronts, engine: FakeEngine) -> None:
    ignoring = fronts(limits=Limits(ignores_system=True))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "task bbbbbb asks?"}]
    assert ignoring.post(messages=turns).json()["ignored"] == ["messages with role system"]
    assert engine.questions()[-1]["messages"] == turns[1:]


WRITTEN = f"task bbbbbb asks{token_text(0, 0)}{token_text(0, 1)}?"
HARMLESS = WRITTEN.replace(MARK, "\N{REPLACEMENT CHARACTER}")
TEXTS: dict[str, Callable[[str], list[Any]]] = {
    "a text": lambda text: [{"role": "user", "content": text}],
    "a part": lambda text: [{"role": "user", "content": [PICTURE_PART, {"type": "text", "text": text}]}],
    "several parts": lambda text: [
        {"role": "user", "content": [{"type": "text", "text": piece} for piece in (text, "and?", text)]}
    ],
    "several images": lambda text: [
        {"role": "user", "content": [PICTURE_PART, {"type": "text", "text": text}, PICTURE_PART]}
    ],
    "an earlier message": lambda text: [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "task aaaaaa asks?"},
    ],
    "a system message": lambda text: [
        {"role": "system", "content": [{"type": "text", "text": text}]},
        {"role": "user", "content": "task aaaaaa asks?"},
    ],
}


@pytest.mark.parametrize("place", TEXTS)
def test_a_sets_token_that_a_user_writes_reaches_neither_routing_nor_the_engine(
    asked: Asked, engine: FakeEngine, place: str
) -> None:
    engine.refuses = (400, "what is sent is what counts here") if place == "several images" else None
    found = list[Any]()
    for text in (WRITTEN, HARMLESS):
        reply = asked.post(messages=TEXTS[place](text)).json()
        found.append((reply.get("prompt_sets"), reply.get("choices"), engine.questions()[-1]))
    assert found[0] == found[1]
    assert MARK not in json.dumps(found[0], ensure_ascii=False)


@pytest.mark.parametrize("field", [{"logit_bias": {"5": 100}}, {"allowed_token_ids": [5]}])
def test_fields_by_which_an_answer_could_hold_a_sets_token_are_refused(
    asked: Asked, engine: FakeEngine, field: dict[str, Any]
) -> None:
    before = len(engine.questions())
    reply = asked.post(messages=messages(question(0)), **field)
    assert reply.status_code == 400
    assert f"{next(iter(field))} is set; expected it to be left out" in reply.json()["error"]["message"]
    assert len(engine.questions()) == before
    assert asked.post(messages=messages(question(0)), **dict.fromkeys(field)).status_code == 200


def test_what_messages_hold_elsewhere_is_made_harmless_by_the_checkpoints_template(
    asked: Asked, engine: FakeEngine
) -> None:
    """Texts that are too long to be parsed pass as they are, and so do tools and calls of tools."""
    system = {"role": "system", "content": token_text(0, 0) + "x" * (1 << 17)}
    engine.refuses = (400, "what is sent is what counts here")
    asked.post(messages=[system, {"role": "user", "content": "task aaaaaa asks?"}])
    sent = engine.questions()[-1]
    assert MARK in sent["messages"][0]["content"]
    arguments = {k: v for k, v in sent["chat_template_kwargs"].items() if k in RESERVED}
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in sent["messages"]]
    text = engine.processor.apply_chat_template(parts, tokenize=False, **arguments)
    assert text.count(MARK) == 2 * LENGTH * len(arguments["prompt_sets"])  # those of the chosen sets alone


@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
@pytest.mark.parametrize(
    "more",
    [
        {"image_url": "http://10.0.0.1/x.png", "uuid": "1"},
        {"prompt_embeds": "", "data": "AA==", "uuid": "1"},
        {"video_url": {"url": "file:///etc/passwd"}, "uuid": "1"},
        {"uuid": "1"},
    ],
)
def test_no_part_is_something_else_for_the_engine_by_further_keys(
    asked: Asked, engine: FakeEngine, more: dict[str, Any], role: str
) -> None:
    """vLLM reads a part that has a uuid by its other keys, whatever its type, and takes images of one uuid for one."""
    engine.refuses = (400, "what is sent is what counts here")
    plain: list[dict[str, Any]] = [
        {"type": "text", "text": "hm?"},
        *([PICTURE_PART] if "image_url" not in more else []),
    ]
    parts: list[dict[str, Any]] = [{**more, **part} for part in plain]
    turns = [{"role": role, "content": parts}, *messages(question(1))]
    asked.post(messages=turns)
    (sent, *_) = engine.questions()[-1]["messages"]
    assert sorted(sent["content"], key=str) == sorted(plain, key=str)


def test_a_question_is_sent_and_routed_without_the_spaces_around_it(asked: Asked, engine: FakeEngine) -> None:
    """As the own engine reads it and as data is prepared."""
    bare, spaced = (
        asked.post(messages=[{"role": "user", "content": text}]).json()
        for text in ("task bbbbbb asks?", "\n task bbbbbb asks? ")
    )
    assert spaced["prompt_sets"] == bare["prompt_sets"] and spaced["choices"] == bare["choices"]
    assert engine.questions()[-1]["messages"] == [{"role": "user", "content": "task bbbbbb asks?"}]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"chat_template": "{{ messages }}"}, "chat_template is set; expected it to be left out"),
        ({"chat_template_kwargs": {"prompt_sets": ["T0"]}}, "routing chooses the prompt sets"),
        ({"chat_template_kwargs": {"prompt_sets_of": "0"}}, "routing chooses the prompt sets"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs is a list; expected an object"),
        ({"max_tokens": 1000}, "max_tokens is 1000; expected a whole number from 1 to 256"),
        ({"model": "other"}, "model is 'other'; expected m."),
        ({"task": "T1"}, "finds the prompt sets by itself"),
    ],
)
def test_what_would_pass_routing_by_is_refused(
    asked: Asked, engine: FakeEngine, fields: dict[str, Any], sentence: str
) -> None:
    reply = asked.post(**{"messages": messages(question(1)), **fields})
    assert reply.status_code in (400, 404) and sentence in reply.json()["error"]["message"]
    assert not engine.questions()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([{"type": "image_url", "image_url": {"url": "http://10.0.0.1/x.png"}}], "addresses are not fetched"),
        ([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}], "addresses are not fetched"),
        ([{"type": "prompt_embeds", "data": "AA=="}], "a part of content has the type the text 'prompt_embeds'"),
        ([{"type": "video_url", "video_url": {"url": PICTURE}}], "a part of content has the type the text 'video_url'"),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_no_message_names_files_or_addresses_to_the_engine(
    asked: Asked, engine: FakeEngine, content: list[Any], sentence: str, role: str
) -> None:
    turns = [{"role": role, "content": [*content, {"type": "text", "text": "hm?"}]}, *messages(question(1))]
    reply = asked.post(messages=turns)
    assert reply.status_code == 400 and sentence in reply.json()["error"]["message"]
    assert not engine.questions()


def test_metrics_are_those_of_the_front_and_of_the_engine(asked: Asked) -> None:
    asked.post(messages=messages(ASKED[1]))
    asked.post(messages=[], stream=True)
    text = asked.client.get("/metrics").text
    assert 'pipeline_serve_requests_total{status="200"} 1' in text
    assert 'pipeline_serve_requests_total{status="400"} 1' in text
    assert 'pipeline_serve_answers_by_set_total{set="T1"} 1' in text
    assert "pipeline_serve_engine_up 1" in text and "vllm:num_requests_running 0" in text


def test_the_model_is_listed_with_its_sets(asked: Asked) -> None:
    (listed,) = asked.client.get("/v1/models").json()["data"]
    assert (listed["id"], listed["prompt_sets"]) == ("m", ["T0", "T1", "T2"])


def test_more_requests_than_may_be_in_progress_are_told_to_come_back(fronts: Fronts, engine: FakeEngine) -> None:
    narrow, statuses = fronts(most=2), list[int]()
    assert narrow.client.get("/health").status_code == 200
    engine.seconds = 0.5

    def ask() -> None:
        statuses.append(narrow.post(messages=messages(ASKED[0])).status_code)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {*statuses} == {200, 429} and statuses.count(200) >= 2
    assert narrow.front.open == 0
    assert narrow.post(messages=messages(ASKED[0])).status_code == 200


def test_requests_at_the_same_time_each_get_their_own_sets(asked: Asked, answerer: Answerer) -> None:
    wanted = [question(n % 3, variant=n % 4, with_image=n % 5 != 4) for n in range(15)]
    expected = answerer.answer(wanted)
    found = dict[int, Any]()

    def ask(number: int) -> None:
        found[number] = asked.post(messages=messages(wanted[number])).json()

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number, answer in enumerate(expected):
        assert "error" not in found[number], found[number]
        assert found[number]["prompt_sets"]["selected"] == answer.selected
        assert found[number]["choices"][0]["message"]["content"].strip() == answer.text


def test_a_question_whose_routing_fails_fails_alone(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    chooser = asked.front.serving.selector.chooser
    keys = chooser.keys

    def failing(questions: Any) -> Any:
        if any(one.text == "break" for one in questions):
            raise RuntimeError("a kernel failed")
        return keys(questions)

    monkeypatch.setattr(chooser, "keys", failing)
    good, bad = (chooser.read(Question(text)) for text in ("fine", "break"))
    results = asked.front.serving.selector._results([good, bad, good])
    assert [type(result).__name__ for result in results] == ["Chosen", "RefusedError", "Chosen"]
    reply = asked.post(messages=[{"role": "user", "content": "break"}])
    assert (reply.status_code, reply.json()["error"]["message"]) == (500, "the request failed (RuntimeError).")


def test_a_client_that_leaves_ends_its_request_in_the_engine(fronts: Fronts, engine: FakeEngine) -> None:
    from tests.serve.asgi import Caller, part

    front = fronts().front
    body = json.dumps({"model": "m", "messages": messages(ASKED[0]), "stream": True}).encode()
    engine.seconds = 0.2

    async def leave() -> None:
        caller = Caller([part(body)])
        async with front.engine.connected():
            asking = asyncio.ensure_future(caller.call(front))  # type: ignore[arg-type]
            while len(caller.received) < 3:
                await asyncio.sleep(0.02)
            caller.gone.set()
            await asking

    asyncio.run(leave())
    for _ in range(100):
        if engine.left:
            break
        time.sleep(0.05)
    assert engine.left == 1 and front.open == 0
    assert front.metrics.requests[499] == 1
