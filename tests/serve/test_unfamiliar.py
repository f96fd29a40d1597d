"""Questions that resemble no task, as clients of the service and its metrics meet them."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pipeline.adapter.answer import Chosen
from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.load import load_adapter
from pipeline.serve.app import Service, Settings
from pipeline.serve.metrics import Metrics
from pipeline.serve.request import Update
from pipeline.serve.worker import Worker
from tests.adapters import foreign, question, save_adapter, save_models
from tests.serve.asgi import Scripted, chat, post

STRANGE = Chosen(["T1"], {"T1": 0.2, "T2": 0.1}, probability={"T1": 0.87, "T2": 0.13}, unfamiliar=True)


@pytest.fixture(scope="module")
def marking(tmp_path_factory: pytest.TempPathFactory) -> Answerer:
    """An adapter that keeps keys of its tasks and marks questions that resemble none."""
    folder: Path = tmp_path_factory.mktemp("marking")
    method: dict[str, Any] = {"router": "random_ridge", "gate": None, "share": 0.5, "unfamiliar": "flag"}
    return load_adapter(save_adapter(folder / "tiny", save_models(folder), **method))


@pytest.fixture(scope="module")
def client(marking: Answerer) -> Iterator[TestClient]:
    service = Service(Worker(marking, 4, 8), Settings("m"))
    with TestClient(service.app(), base_url="http://localhost") as client:
        yield client


def ask(client: TestClient, asked: Question, **fields: Any) -> Any:
    parts: list[Any] = [{"type": "text", "text": asked.text}]
    if asked.image is not None:
        url = "data:image/png;base64," + base64.b64encode(asked.image).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], **fields}
    return client.post("/v1/chat/completions", json=body)


def counted(client: TestClient) -> int:
    lines = client.get("/metrics").text.splitlines()
    assert "# TYPE pipeline_serve_unfamiliar_total counter" in lines
    return next(int(line.split()[1]) for line in lines if line.startswith("pipeline_serve_unfamiliar_total "))


def test_a_reply_says_it_and_the_metric_counts_it(client: TestClient, marking: Answerer) -> None:
    before = counted(client)
    own, strange = ask(client, question(1, 6)).json(), ask(client, foreign()).json()
    assert own["prompt_sets"]["unfamiliar"] is False and strange["prompt_sets"]["unfamiliar"] is True
    expected = marking.answer([question(1, 6), foreign()])
    for reply, answer in zip((own, strange), expected, strict=True):
        found, wanted = dict(reply["prompt_sets"]), answer.to_json()
        for numbers in ("similarity", "probability"):  # rounded, and questions are answered in other batches
            assert found.pop(numbers) == pytest.approx(wanted.pop(numbers), abs=2e-4)
        assert found == wanted
        assert reply["choices"][0]["message"]["content"] == answer.text
    assert own["prompt_sets"]["probability"]["T1"] > 0.5
    assert counted(client) == before + 1


def test_a_request_decides_for_its_question(client: TestClient, marking: Answerer) -> None:
    before = counted(client)
    reply = ask(client, foreign(), unfamiliar="zero_shot").json()
    assert reply["prompt_sets"]["selected"] == [] and reply["prompt_sets"]["unfamiliar"] is True
    alone = Question(foreign().text, foreign().image, unfamiliar="zero_shot")
    assert reply["choices"][0]["message"]["content"] == marking.answer([alone])[0].text
    assert ask(client, question(0, 6), unfamiliar="zero_shot").json()["prompt_sets"]["selected"] == ["T0"]
    assert ask(client, foreign(), unfamiliar=None).json()["prompt_sets"]["selected"]  # null: left out
    assert counted(client) == before + 2


@pytest.mark.parametrize(
    ("given", "found"), [("refuse", "the text 'refuse'"), (True, "true"), (["flag"], "a list"), (2, "2")]
)
def test_another_value_is_refused(client: TestClient, given: Any, found: str) -> None:
    refused = ask(client, foreign(), unfamiliar=given)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == f"unfamiliar is {found}; expected answer, zero_shot or flag."


def test_the_first_event_of_a_stream_says_it(client: TestClient) -> None:
    lines = ask(client, foreign(), stream=True).text.splitlines()
    assert json.loads(lines[0].removeprefix("data: "))["prompt_sets"]["unfamiliar"] is True


def test_the_model_says_what_becomes_of_them(client: TestClient, answerer: Answerer) -> None:
    assert client.get("/v1/models/m").json()["unfamiliar"] == "flag"
    other = TestClient(Service(Scripted(answerer), Settings("m")).app(), base_url="http://localhost")
    assert other.get("/v1/models/m").json()["unfamiliar"] is None


def test_sets_that_cannot_tell_have_no_such_field_and_refuse_the_modes_that_need_it(answerer: Answerer) -> None:
    service = Service(Scripted(answerer, Update("red", "stop", chosen=Chosen(["T1"], {"T1": 0.7}))), Settings("m"))
    for mode in ("flag", "zero_shot"):
        refused = post(service, chat("what?", unfamiliar=mode))
        assert refused.status == 400 and f"unfamiliar is the text '{mode}', but" in refused.error
        assert "keep no routing keys" in refused.error
    answered = post(service, chat("what?", unfamiliar="answer"))
    assert json.loads(answered.body)["prompt_sets"] == {"selected": ["T1"], "similarity": {"T1": 0.7}}
    assert "pipeline_serve_unfamiliar_total 0" in service.metrics.text({}, {})


def test_the_line_of_a_request_says_it(answerer: Answerer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline.serve"):
        post(Service(Scripted(answerer, Update("red", "stop", chosen=STRANGE)), Settings("m")), chat())
    assert caplog.records[-1].getMessage().endswith(", T1 87 %, unfamiliar")


def test_only_answers_are_counted() -> None:
    metrics = Metrics()
    for chosen in (STRANGE, Chosen(["T2"], unfamiliar=False), Chosen([], unfamiliar=True), Chosen(["T2"])):
        metrics.answered(chosen)
    text = metrics.text({}, {})
    assert "pipeline_serve_unfamiliar_total 2\n" in text
    assert 'pipeline_serve_answers_by_set_total{set="T2"} 2\n' in text
