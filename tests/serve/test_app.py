"""The application around a chat request: other methods, pages of other origins, lines of the log, large images."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import shutil
import threading
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

from pipeline.adapter.answer import Chosen
from pipeline.adapter.answering import Answerer, Tokenised
from pipeline.adapter.load import load_adapter
from pipeline.cli.commands import app
from pipeline.errors import EXIT_USER
from pipeline.serve.app import Service, Settings
from pipeline.serve.chat import Limits
from pipeline.serve.images import DecodingSpace, ImageLimits
from pipeline.serve.request import Update
from pipeline.serve.worker import Worker
from tests import tiny
from tests.adapters import COLOURS
from tests.serve.asgi import Caller, Scripted, chat, post

WHOLE = Update("red", "stop", completion_tokens=2, prompt_tokens=31, chosen=Chosen(["T1"], {"T1": 0.714}))
PAGE = "http://localhost:3000"


def test_another_method_is_told_which_one_is_expected(answerer: Answerer) -> None:
    service = Service(Worker(answerer, 2, 2), Settings("m"))
    caller = asyncio.run(Caller([]).call(service, method="GET"))
    assert (caller.status, caller.headers["allow"]) == (405, "POST")
    assert caller.error == "/v1/chat/completions does not take GET; expected POST."


def test_a_method_that_needs_the_task_says_which_there_are(adapter: Path, tmp_path: Path) -> None:
    told = shutil.copytree(adapter, tmp_path / "told")
    meta = json.loads((told / "adapter.json").read_text())
    meta["method"]["selection"] = "oracle"
    (told / "adapter.json").write_text(json.dumps(meta))
    service = Service(Worker(load_adapter(told), 2, 2), Settings("m"))
    client = TestClient(service.app(), base_url="http://localhost")
    reply = client.post("/v1/chat/completions", json=json.loads(chat()["body"]))
    assert reply.status_code == 400
    expected = "method selection oracle needs the task; set task (--task) to one of T0, T1, T2."
    assert reply.json()["error"]["message"] == expected


@pytest.mark.parametrize(("origins", "allowed"), [((), None), ((PAGE,), PAGE), (("http://other",), None)])
def test_a_page_may_ask_where_its_origin_was_named(
    answerer: Answerer, origins: tuple[str, ...], allowed: str | None
) -> None:
    service = Service(Scripted(answerer, WHOLE), Settings("m", origins=origins))
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "content-type"}
    client = TestClient(service.app(), base_url="http://localhost")  # not entered: the scripted worker has no thread
    preflight = client.options("/v1/chat/completions", headers=asked)
    assert preflight.headers.get("access-control-allow-origin") == allowed
    body = json.loads(chat()["body"])
    reply = client.post("/v1/chat/completions", json=body, headers={"origin": PAGE})
    assert (reply.status_code, reply.headers.get("access-control-allow-origin")) == (200, allowed)


@pytest.mark.parametrize(
    ("origin", "sentence"),
    [("*", "accepts requests of any web page"), ("localhost:3000", "expected scheme and host"), (f"{PAGE}/", "scheme")],
)
def test_an_origin_that_is_none_is_said_before_anything_is_loaded(adapter: Path, origin: str, sentence: str) -> None:
    done = CliRunner().invoke(app, ["serve", str(adapter), "--origin", origin])
    assert done.exit_code == EXIT_USER and sentence in done.stderr


def test_every_request_is_a_line_without_its_content(answerer: Answerer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pipeline.serve"):
        post(Service(Scripted(answerer, WHOLE), Settings("m")), chat("my secret?", tiny.png(COLOURS[0])))
        post(Service(Scripted(answerer, WHOLE), Settings("m")), chat("my secret?", model="another"))
    answered, refused = (record.getMessage() for record in caplog.records)
    assert answered.startswith("127.0.0.1, 200, 0.") and answered.endswith(" s, PNG 32x32, 31+2 tokens, T1 0.71")
    assert refused.startswith("127.0.0.1, 404 model_not_found, ")
    assert "secret" not in answered + refused and "red" not in answered.replace("refused", "")


def test_what_was_ignored_is_said_in_the_reply(answerer: Answerer) -> None:
    settings = Settings("m", limits=Limits(ignores_system=True))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "what?"}]
    whole = post(Service(Scripted(answerer, WHOLE), settings), chat(messages=messages))
    assert json.loads(whole.body)["ignored"] == ["messages with role system"]
    streamed = post(Service(Scripted(answerer, WHOLE), settings), chat(messages=messages, stream=True))
    assert json.loads(streamed.body.split("\n\n")[0].removeprefix("data: "))["ignored"] == ["messages with role system"]
    assert "ignored" not in json.loads(post(Service(Scripted(answerer, WHOLE), settings), chat()).body)


def test_an_image_up_to_four_megapixels_is_what_predict_reads_and_a_larger_one_nearly(answerer: Answerer) -> None:
    ramp = Image.linear_gradient("L").resize((3000, 2000)).convert("RGB")
    for picture in (ramp.resize((300, 200)), ramp):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        worker = Scripted(answerer, WHOLE)
        assert post(Service(worker, Settings("m")), chat(image=buffer.getvalue())).status == 200
        read = worker.requests[0].question
        assert isinstance(read, Tokenised) and read.pixels is not None and read.example.images is not None
        expected = answerer.encoder.pixels([picture])
        assert (read.pixels - expected).abs().max() <= (0.0 if picture.size[0] == 300 else 0.03)


def test_an_image_whose_decoder_would_take_too_much_is_refused_with_its_size(answerer: Answerer) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4000, 4000)).save(buffer, "WEBP", lossless=True, method=0)
    caller = post(Service(Worker(answerer, 2, 2), Settings("m")), chat(image=buffer.getvalue()))
    assert caller.status == 413
    assert "the WEBP image of 4000 x 4000 pixels would take" in caller.error and "ordinary JPEG" in caller.error


def test_images_are_decoded_together_only_as_far_as_there_is_room() -> None:
    space, inside, together = DecodingSpace(100), list[int](), list[int]()
    enter = threading.Barrier(2, timeout=5)

    def decode(size: int) -> None:
        enter.wait()
        with space.hold(size):
            inside.append(size)
            together.append(sum(inside))
            inside.remove(size)

    threads = [threading.Thread(target=decode, args=(size,)) for size in (60, 70)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert together == [60, 70] or together == [70, 60]
    with space.hold(500):  # more than all: alone
        assert space.held == 100
    assert space.held == 0


def test_the_limit_of_decoding_follows_the_largest_image() -> None:
    assert ImageLimits(4096 * 4096).decode_bytes == 160 << 20
    assert ImageLimits(8192 * 8192).decode_bytes == 640 << 20


def test_an_image_of_too_many_tokens_is_refused_before_its_pixels_are_made(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*given: object, **named: object) -> None:
        raise AssertionError("the image was decoded")

    monkeypatch.setattr(answerer, "tokenise", made)
    monkeypatch.setattr(answerer.lmm.conversation, "max_length", 20)
    caller = post(Service(Worker(answerer, 2, 2), Settings("m")), chat(image=tiny.png(COLOURS[0])))
    assert caller.status == 400 and "more than the 20 of model.max_length" in caller.error
