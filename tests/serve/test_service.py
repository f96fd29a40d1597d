"""The service's parts in this process: batches that change at every token, the queue, what fails, who may listen."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.adapter.answering import Answerer
from pipeline.cli.commands import app
from pipeline.errors import EXIT_USER
from pipeline.serve.app import Service, Settings
from pipeline.serve.decoder import Running, RunningBatch
from pipeline.serve.request import FullError, Request, StoppedError, Update
from pipeline.serve.worker import Worker
from tests.adapters import question
from tests.joining import joined_by_twos
from tests.serve.asgi import Caller, chat, post


def test_answers_do_not_depend_on_who_joins_or_leaves_the_batch(answerer: Answerer) -> None:
    asked = [question(n % 3, variant=n % 4, with_image=n % 5 != 4) for n in range(12)]
    expected = [answer.text for answer in answerer.answer(asked)]
    began = joined_by_twos(answerer, asked, 6, leaving=7)
    assert [row.text for row in began if row.key != 7] == [text for n, text in enumerate(expected) if n != 7]
    assert all(row.finish in ("stop", "length") for row in began if row.key != 7)


def test_a_full_queue_is_said_and_not_waited_for(answerer: Answerer) -> None:
    worker = Worker(answerer, batch=2, queue=1)  # not started: what is submitted waits
    worker.submit(Request(question(0), 1, lambda update: None))
    with pytest.raises(FullError):
        worker.submit(Request(question(0), 1, lambda update: None))


def test_a_failing_batch_is_told_and_the_next_one_is_answered(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, updates = Worker(answerer, 2, 4), list[Update]()

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("a kernel failed")

    with monkeypatch.context() as patched:
        patched.setattr(RunningBatch, "begin", broken)
        worker._turn([Request(question(0), 6, updates.append)])
    assert [(update.finish, update.error) for update in updates] == [("failed", "the model failed (RuntimeError).")]
    worker._turn([Request(question(0), 1, updates.append)])
    assert updates[-1].finish in ("stop", "length")


def test_a_request_that_breaks_something_breaks_it_for_itself_alone(answerer: Answerer) -> None:
    worker, told, others = Worker(answerer, 4, 4), list[Update](), list[Update]()
    half_a_character = dataclasses.replace(question(0), text="\ud800")  # no tokenizer takes it
    worker._turn([Request(half_a_character, 6, told.append), Request(question(1), 6, others.append)])
    assert (told[0].finish, len(worker.running.rows)) == ("failed", 1)
    assert others[0].error is None


def test_a_model_that_cannot_go_on_tells_everybody_and_takes_nobody_any_more(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, failed, waiting = Worker(answerer, batch=1, queue=4), list[Update](), list[Update]()
    worker.submit(Request(question(0), 6, failed.append))
    worker.submit(Request(question(0), 6, waiting.append))

    def broken(*arguments: Any) -> Any:
        raise RuntimeError("device lost")

    monkeypatch.setattr(RunningBatch, "begin", broken)
    monkeypatch.setattr(RunningBatch, "__init__", broken)
    with pytest.raises(RuntimeError, match="device lost"):
        worker._run()
    assert failed[0].error == "the model failed (RuntimeError)."
    assert waiting[0].finish == "stopped"
    with pytest.raises(StoppedError, match="started again"):
        worker.submit(Request(question(0), 6, failed.append))
    service = Service(worker, Settings("m"))
    refused = post(service, chat())
    assert (refused.status, "started again" in refused.error) == (503, True)
    assert asyncio.run(Caller([]).call(service, "/health", "GET")).status == 503


def test_a_worker_that_has_stopped_is_not_alive_whatever_its_thread_still_does(answerer: Answerer) -> None:
    worker = Worker(answerer, 2, 4)
    worker.start()
    assert worker.alive
    worker.close()
    assert not worker.alive


def test_stopping_tells_those_who_wait(answerer: Answerer) -> None:
    worker, updates = Worker(answerer, 2, 4), list[Update]()
    worker._closing = True
    worker.submit(Request(question(0), 6, updates.append))
    worker._run()
    assert updates[0].error == "the server is stopping; ask again later."


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "set PIPELINE_API_KEY"),
        (["--host", "256.1.1.1"], "set PIPELINE_API_KEY"),
    ],
)
def test_other_machines_are_not_let_in_without_a_key(adapter: Path, options: list[str], sentence: str) -> None:
    done = CliRunner().invoke(app, ["serve", str(adapter), *options])
    assert done.exit_code == EXIT_USER
    assert sentence in done.stderr


def test_a_taken_port_is_said_before_the_model_is_loaded(adapter: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = CliRunner().invoke(app, ["serve", str(adapter), "--port", str(taken.getsockname()[1])])
    assert done.exit_code == EXIT_USER
    assert "choose another --port" in done.stderr


def test_the_penalty_on_repeated_tokens_is_that_of_the_adapter(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = answerer.answer([question(0)])[0].text
    monkeypatch.setattr(answerer.lmm.model.generation_config, "repetition_penalty", None)
    answerer.lmm.use_repetition_penalty(30.0)
    batch, row = RunningBatch(answerer), Running(0, 6)
    batch.begin(answerer.route([question(0)]), [row])
    while batch.rows:
        batch.step()
    assert row.text == answerer.answer([question(0)])[0].text != plain
