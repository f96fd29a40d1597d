"""The front that sends the chosen sets' vectors with each request, and takes up new tasks while it runs."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from pipeline.adapter.answering import Answerer
from pipeline.adapter.choosing import Chooser
from pipeline.adapter.load import load_adapter
from pipeline.adapter.vocabulary.export import ROUTER, export_checkpoint
from pipeline.adapter.vocabulary.part import PLACEHOLDER
from pipeline.cli.commands import app
from pipeline.errors import EXIT_USER, UserError
from pipeline.serve.front.engine import Behind, Engine
from pipeline.serve.front.front import Front
from pipeline.serve.front.sets import Folder
from pipeline.serve.web import Settings
from tests.adapters import LENGTH, Models, question, save_adapter
from tests.serve.front.conftest import Asked
from tests.serve.front.fake_engine import FakeEngine
from tests.serve.front.test_front import ASKED, PICTURE_PART
from tests.serve.test_openai_client import messages


@pytest.fixture(scope="session")
def checkpoint(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "parts"
    export_checkpoint(adapter, folder, "parts")
    return folder


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[FakeEngine]:
    fake = FakeEngine(checkpoint).up()
    yield fake
    fake.down()


@pytest.fixture
def growing(adapter: Path, tmp_path: Path) -> Path:
    """A copy of the adapter that a test may change."""
    return Path(shutil.copytree(adapter, tmp_path / "growing"))


@pytest.fixture
def asked(growing: Path, engine: FakeEngine) -> Iterator[Asked]:
    folder = Folder(growing, "parts")
    sets = folder.read()
    front = Front(
        sets, Chooser(sets.source, "cpu"), Engine(Behind(engine.url, sets.form)), Settings("m"), 16, folder.read
    )
    with TestClient(front.app(), base_url="http://localhost") as client:
        yield Asked(front, client)


def models_of(adapter: Path) -> Models:
    meta = json.loads((adapter / "adapter.json").read_text())
    return Models(Path(meta["model"]["path"]), Path(meta["clip"]["path"]))


def vectors_of(body: dict[str, Any]) -> torch.Tensor:
    (part,) = body["messages"][0]["content"]
    vectors = torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True)
    assert isinstance(vectors, torch.Tensor)
    return vectors


def reload(asked: Asked, **options: Any) -> Any:
    return asked.client.post("/reload", **{"json": {}, **options})


@pytest.mark.parametrize("number", range(len(ASKED)))
def test_an_answer_is_that_of_the_own_engine_and_its_request_has_the_sets_vectors(
    asked: Asked, engine: FakeEngine, answerer: Answerer, number: int
) -> None:
    expected = answerer.answer([ASKED[number]])[0]
    reply = asked.post(messages=messages(ASKED[number]))
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"].strip() == expected.text
    assert reply.json()["prompt_sets"]["selected"] == expected.selected
    sent = engine.questions()[-1]
    pool = answerer.pool
    wanted = torch.cat([pool.prompts[pool.names.index(name)] for name in expected.selected])
    torch.testing.assert_close(vectors_of(sent), wanted, rtol=0, atol=0)
    assert len(wanted) == LENGTH * len(expected.selected)
    assert sent["chat_template_kwargs"]["prompt_vectors"] is True and "prompt_sets" not in sent["chat_template_kwargs"]


def test_a_conversation_stays_as_it_is_behind_the_vectors(asked: Asked, engine: FakeEngine) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [PICTURE_PART, {"type": "text", "text": "first?"}]},
        {"role": "assistant", "content": "an answer"},
        {"role": "user", "content": "second?"},
    ]
    assert asked.post(messages=turns).status_code == 200
    assert engine.questions()[-1]["messages"][1:] == turns


def test_a_placeholder_that_a_user_writes_is_no_place_for_vectors(asked: Asked, engine: FakeEngine) -> None:
    """vLLM would refuse such a text; routing and engine get the same one without it."""
    harmless = PLACEHOLDER.replace("_", "\N{REPLACEMENT CHARACTER}")
    found = list[Any]()
    for text in (PLACEHOLDER, harmless):
        reply = asked.post(messages=[{"role": "user", "content": f"task bbbbbb {text} asks?"}])
        assert reply.status_code == 200, reply.text
        found.append((reply.json()["prompt_sets"], reply.json()["choices"], engine.questions()[-1]))
    assert found[0] == found[1]
    assert found[0][2]["messages"][-1]["content"] == f"task bbbbbb {harmless} asks?"


def test_the_template_does_not_depend_on_it(asked: Asked, engine: FakeEngine) -> None:
    asked.post(messages=[{"role": "user", "content": "task bbbbbb asks?"}])
    body, texts = engine.questions()[-1], list[str]()
    for text in (PLACEHOLDER, PLACEHOLDER.replace("_", "\N{REPLACEMENT CHARACTER}")):
        body["messages"][-1]["content"] = f"task bbbbbb {text} asks?"
        texts.append(engine.text(engine.answer(body)))
    assert texts[0] == texts[1]


def test_no_client_sends_vectors_past_routing(asked: Asked, engine: FakeEngine) -> None:
    reply = asked.post(messages=messages(ASKED[0]), chat_template_kwargs={"prompt_vectors": True})
    assert reply.status_code == 400 and "routing chooses the prompt sets" in reply.json()["error"]["message"]
    part = {"type": "prompt_embeds", "data": "AA=="}
    reply = asked.post(messages=[{"role": "user", "content": [part]}, *messages(ASKED[0])])
    assert reply.status_code == 400 and "prompt_embeds" in reply.json()["error"]["message"]
    assert not engine.questions()


def test_a_new_task_is_answered_without_a_restart(asked: Asked, growing: Path, engine: FakeEngine) -> None:
    save_adapter(growing, models_of(growing), numbers=(0, 1, 2, 3))
    before = asked.post(messages=messages(question(3))).json()
    assert "T3" not in before["prompt_sets"]["similarity"]
    reply = reload(asked)
    assert (reply.status_code, reply.json()) == (200, {"prompt_sets": ["T0", "T1", "T2", "T3"], "added": ["T3"]})
    (listed,) = asked.client.get("/v1/models").json()["data"]
    assert listed["prompt_sets"] == ["T0", "T1", "T2", "T3"]
    expected = load_adapter(growing).answer([question(3)])[0]
    after = asked.post(messages=messages(question(3))).json()
    assert expected.selected[-1] == "T3" and after["prompt_sets"]["selected"] == expected.selected
    assert after["choices"][0]["message"]["content"].strip() == expected.text
    assert len(engine.asked) - len(engine.questions()) == 2  # the engine was verified once, before the new task


def test_sets_that_cannot_take_the_place_of_the_served_ones_are_refused_and_nothing_changes(
    asked: Asked, growing: Path, tmp_path: Path
) -> None:
    tensors = (growing / "prompts.safetensors").read_bytes()
    (growing / "prompts.safetensors").write_bytes(tensors[:-4])
    reply = reload(asked)
    assert reply.status_code == 409
    assert "The prompt sets of before are still served." in reply.json()["error"]["message"]
    save_adapter(growing, models_of(growing), insertion="before_image")
    reply = reload(asked)
    assert reply.status_code == 409
    assert "has another frozen model or place for its sets than before; start the service anew" in reply.text
    assert asked.post(messages=messages(ASKED[0])).status_code == 200


def test_a_reload_needs_the_key_and_a_body_that_no_foreign_page_can_send(growing: Path, engine: FakeEngine) -> None:
    folder = Folder(growing, "parts")
    sets, settings = folder.read(), Settings("m", api_key="secret")
    front = Front(sets, Chooser(sets.source, "cpu"), Engine(Behind(engine.url, sets.form)), settings, 16, folder.read)
    with TestClient(front.app(), base_url="http://localhost") as client:
        assert client.post("/reload", json={}).status_code == 401
        client.headers["authorization"] = "Bearer secret"
        assert client.post("/reload", content="x").status_code == 415
        assert client.get("/reload").status_code == 405
        assert client.post("/reload", json={}).json()["added"] == []


def test_an_engine_without_the_flag_is_said(asked: Asked, engine: FakeEngine) -> None:
    engine.takes_vectors = False
    reply = asked.post(messages=messages(ASKED[0]))
    assert reply.status_code == 503
    assert "refuses prompt sets (You must set `--enable-prompt-embeds`" in reply.json()["error"]["message"]
    assert "vLLM 0.32 or newer, started with --enable-prompt-embeds" in reply.json()["error"]["message"]
    engine.takes_vectors = True
    assert asked.post(messages=messages(ASKED[0])).status_code == 200


def test_a_checkpoint_of_the_other_form_is_refused(growing: Path, checkpoint: Path, tmp_path: Path) -> None:
    sets = Folder(growing, "vocabulary").read()
    with pytest.raises(UserError, match="in another form"):
        sets.require_export(checkpoint)
    with pytest.raises(UserError, match="is an exported checkpoint; expected the run or the adapter"):
        Folder(checkpoint, "parts").read()


def test_the_export_lists_no_sets_and_fits_every_adapter_of_the_model(growing: Path, checkpoint: Path) -> None:
    listed = json.loads((checkpoint / ROUTER).read_text())
    assert (
        "sets" not in listed and list(listed["placeholder"]) == [PLACEHOLDER] and not (checkpoint / "adapter").exists()
    )
    assert "--enable-prompt-embeds" in (checkpoint / "README.md").read_text()
    save_adapter(growing, models_of(growing), numbers=(3,))
    Folder(growing, "parts").read().require_export(checkpoint)


def test_the_form_is_an_option_of_vllm_alone(growing: Path) -> None:
    from typer.testing import CliRunner

    done = CliRunner().invoke(app, ["serve", str(growing), "--sets", "parts"])
    assert done.exit_code == EXIT_USER and "--engine is own, where --sets means nothing" in " ".join(
        done.stderr.split()
    )
