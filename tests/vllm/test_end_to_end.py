"""A real vLLM behind the front, on two CPU cores: its answers are those of the own engine, whatever happens to it."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from pipeline.adapter.answering import Question
from pipeline.adapter.vocabulary.tokens import token_text
from pipeline.cli.commands import app
from pipeline.config.paths import PROJECT
from pipeline.errors import EXIT_USER
from tests.adapters import Models, save_adapter
from tests.serve import curl
from tests.serve.conftest import address_of, drain, start
from tests.serve.test_openai_client import messages
from tests.vllm.models import TASKS, nano_question, nano_questions, save_loadable

pytestmark = [pytest.mark.vllm, pytest.mark.e2e]

PROGRAM = Path(os.environ.get("VLLM_PROGRAM", PROJECT / ".venv-vllm" / "bin" / "vllm"))
# Compiling would take longer than all answers; the model has 1024 positions.
SMALL = "--enforce-eager --max-model-len 512 --limit-mm-per-prompt '{\"image\": 1}'"
KEY = "a key of the tests"
QUESTIONS = 300
CLIENTS = 8
STARTS_S = 600.0
# One GiB for keys and values; a front that starts its own engine takes the key of the environment.
ENGINE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_API_KEY": KEY, "VLLM_LOGGING_LEVEL": "WARNING"}


@dataclass
class Running:
    """A service and a client of it."""

    process: Any
    url: str
    client: openai.OpenAI

    def ask(self, asked: Question, **options: Any) -> Any:
        return self.client.chat.completions.create(model="m", messages=messages(asked), **options)

    def text(self, asked: Question) -> tuple[str, list[str]]:
        """The answer, without the spaces around it that vLLM leaves and the own engine does not, and its sets."""
        reply: Any = self.ask(asked)
        return reply.choices[0].message.content.strip(), reply.prompt_sets["selected"]

    def engine(self) -> psutil.Process:
        """The process of vLLM that this service has started."""
        (process,) = psutil.Process(self.process.pid).children()
        return process

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=60) as reply:
                return bool(reply.status == 200)
        except urllib.error.HTTPError:
            return False


def running(folder: Path, *options: str, **environment: str) -> Iterator[Running]:
    process = start(folder, "--name", "m", *options, **environment)
    try:
        url = address_of(process)
        drain(process)
        yield Running(process, url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_loadable(tmp_path_factory.mktemp("loadable"))


@pytest.fixture(scope="module")
def adapter(models: Models) -> Path:
    return save_tasks(models.llava.with_name("adapter"), models, len(TASKS))


def save_tasks(folder: Path, models: Models, count: int) -> Path:
    """Write an adapter with sets for the first tasks, which their own questions find."""
    return save_adapter(folder, models, tuple(range(count)), nano_question, insertion="after_image")


@pytest.fixture(scope="module")
def own(adapter: Path) -> Iterator[Running]:
    yield from running(adapter)


def in_front(adapter: Path, form: str = "vocabulary") -> Iterator[Running]:
    """A service in front of a vLLM that it starts with a checkpoint that it exports."""
    if not PROGRAM.is_file():
        pytest.skip(f"{PROGRAM} is missing; `make test-vllm` installs it")
    checkpoint = adapter.with_name(f"{adapter.name}-{form}")
    options = ["--engine", "vllm", "--checkpoint", str(checkpoint), "--vllm", str(PROGRAM), "--engine-args", SMALL]
    yield from running(adapter, *options, "--sets", form, **ENGINE)


@pytest.fixture(scope="module")
def front(adapter: Path) -> Iterator[Running]:
    yield from in_front(adapter)


@pytest.fixture(scope="module")
def growing(models: Models) -> Path:
    """An adapter with all tasks but the last, which a test adds."""
    return save_tasks(models.llava.with_name("growing"), models, len(TASKS) - 1)


@pytest.fixture(scope="module")
def parts(growing: Path) -> Iterator[Running]:
    yield from in_front(growing, "parts")


def asked(number: int) -> Question:
    """One of some hundred different questions, every fifth without an image."""
    base = nano_question(number % len(TASKS), number % 4, with_image=number % 5 != 4)
    return Question(f"{base.text} number {number}", base.image)


def answers(service: Running, questions: Sequence[Question]) -> list[tuple[str, list[str]]]:
    """Answers and their sets, from several clients at once."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(service.text, questions))


def require_equal_answers(found: list[tuple[str, list[str]]], expected: list[tuple[str, list[str]]]) -> None:
    assert [sets for _, sets in found] == [sets for _, sets in expected]
    assert {sets[-1] for _, sets in found} == {f"T{number}" for number in range(len(TASKS))}
    assert len({text for text, _ in expected}) > 1
    assert [text for text, _ in found] == [text for text, _ in expected]


@pytest.fixture(scope="module")
def expected(own: Running) -> list[tuple[str, list[str]]]:
    return answers(own, nano_questions(QUESTIONS))


def test_answers_with_sets_in_the_vocabulary_are_those_of_the_own_engine(
    front: Running, expected: list[tuple[str, list[str]]]
) -> None:
    require_equal_answers(answers(front, nano_questions(QUESTIONS)), expected)


def test_a_task_is_added_without_a_restart_and_answers_with_vectors_are_those_of_the_own_engine(
    parts: Running, growing: Path, models: Models, expected: list[tuple[str, list[str]]]
) -> None:
    engine, last = parts.engine().pid, f"T{len(TASKS) - 1}"
    assert not any(last in sets for _, sets in answers(parts, nano_questions(len(TASKS))))
    save_tasks(growing, models, len(TASKS))
    assert curl.run(curl.shown("/reload"), parts.url)["added"] == [last]
    require_equal_answers(answers(parts, nano_questions(QUESTIONS)), expected)
    assert parts.engine().pid == engine


def test_questions_without_an_image(own: Running, parts: Running) -> None:
    bare = [asked(number) for number in range(4, 60, 5)]
    assert answers(parts, bare) == answers(own, bare)


def test_a_placeholder_that_a_user_writes_is_the_text_that_it_becomes(own: Running, parts: Running) -> None:
    """vLLM itself would refuse the request."""
    written, harmless = (Question(f"what is <prompt{sign}embeds> here?") for sign in ("_", "\N{REPLACEMENT CHARACTER}"))
    assert parts.text(written) == parts.text(harmless) == own.text(harmless)


def test_the_request_of_the_documentation_is_answered_by_curl(own: Running, front: Running, tmp_path: Path) -> None:
    picture = nano_question(4).image
    assert picture is not None
    reply = curl.run(curl.shown("scene.png | tr"), front.url, "m", picture, tmp_path)
    found = (reply["choices"][0]["message"]["content"].strip(), reply["prompt_sets"]["selected"])
    assert found == own.text(curl.question(picture))


def test_no_part_of_a_message_is_something_else_for_vllm_by_a_uuid(front: Running, parts: Running) -> None:
    """It would read these texts as a picture at an address and as vectors, and take one picture for another."""
    text = {"type": "text", "text": "what is here?", "uuid": "1"}
    expected = [service.text(Question("what is here?")) for service in (front, parts)]
    for more in ({"image_url": "http://127.0.0.1:9/x.png"}, {"prompt_embeds": "", "data": "AA=="}):
        for service, answer in zip((front, parts), expected, strict=True):
            asked_with: list[Any] = [{"role": "user", "content": [{**text, **more}]}]
            reply: Any = service.client.chat.completions.create(model="m", messages=asked_with)
            assert (reply.choices[0].message.content.strip(), reply.prompt_sets["selected"]) == answer
    for number in range(2):
        (message,) = messages(asked(number))
        for part in message["content"]:
            part["uuid"] = "2"
        reply = front.client.chat.completions.create(model="m", messages=[message])
        found = (reply.choices[0].message.content.strip(), reply.prompt_sets["selected"])
        assert found == front.text(asked(number))


def test_an_engine_without_the_flag_or_of_the_other_form_is_refused_before_anything_is_served(
    front: Running, growing: Path
) -> None:
    from typer.testing import CliRunner

    words = front.engine().cmdline()
    url = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    options = ["serve", str(growing), "--engine", "vllm", "--sets", "parts", "--behind", url, "--port", "0"]
    done = CliRunner().invoke(app, options, env={"PIPELINE_ENGINE_KEY": KEY})
    said = " ".join(done.stderr.split())
    assert done.exit_code == EXIT_USER and "refuses prompt sets (You must set `--enable-prompt-embeds`" in said, said


def test_a_stream_is_the_same_text(own: Running, front: Running) -> None:
    events = list(front.ask(asked(1), stream=True, stream_options={"include_usage": True}))
    assert events[0].prompt_sets["selected"]
    text = "".join(choice.delta.content or "" for event in events for choice in event.choices)
    assert text.strip() == own.text(asked(1))[0]
    assert events[-1].usage.completion_tokens >= 1


def test_what_the_own_engine_refuses_is_passed_on(front: Running) -> None:
    several = front.ask(asked(1), n=2, seed=1, temperature=1.0)
    assert len(several.choices) == 2
    scored = front.ask(asked(1), logprobs=True, top_logprobs=2, max_tokens=2)
    assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 2
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    formed = front.ask(asked(1), response_format=form, max_tokens=30)
    assert formed.choices[0].message.content.startswith("{")
    whole = front.text(asked(0))[0]
    stopped = front.ask(asked(0), stop=[whole[1:3]])
    assert len(whole) > 2 and stopped.choices[0].message.content.strip() == whole[: whole.index(whole[1:3])]
    turns = [{"role": "system", "content": "Be brief."}, *messages(asked(0)), {"role": "assistant", "content": "red"}]
    turns[1]["content"] = turns[1]["content"][:1]  # the limit is one image
    reply: Any = front.client.chat.completions.create(model="m", messages=[*turns, *messages(asked(1))])
    assert reply.choices[0].message.content


@pytest.mark.parametrize("earlier", [False, True], ids=["question", "earlier messages"])
def test_a_sets_token_that_a_user_writes_changes_nothing_but_its_own_text(front: Running, earlier: bool) -> None:
    texts = (token_text(0, 0), token_text(0, 0).replace("\U0010e5e7", "\N{REPLACEMENT CHARACTER}"))
    replies: list[Any] = [
        front.client.chat.completions.create(
            model="m", messages=conversation(text, earlier), logprobs=True, max_tokens=1
        )
        for text in texts
    ]
    written, harmless = replies
    assert written.prompt_sets == harmless.prompt_sets
    assert written.usage.prompt_tokens == harmless.usage.prompt_tokens
    one, other = (reply.choices[0].logprobs.content[0] for reply in (written, harmless))
    assert (one.token, one.logprob) == (other.token, pytest.approx(other.logprob, abs=1e-4))


def conversation(text: str, earlier: bool) -> list[Any]:
    """A question with a text in it, or one behind messages with that text."""
    if not earlier:
        return messages(Question(f"what is {text}?"))
    told: list[Any] = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    return [*told, {"role": "assistant", "content": text}, *messages(Question("what is here?"))]


def test_metrics_are_those_of_both(front: Running) -> None:
    with urllib.request.urlopen(f"{front.url}/metrics") as reply:
        text = reply.read().decode()
    assert "pipeline_serve_engine_up 1" in text and "vllm:" in text


def test_another_adapter_is_refused_at_the_same_engine(front: Running, models: Models, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    other = save_tasks(tmp_path / "other", models, 2)
    words = front.engine().cmdline()
    url = f"http://127.0.0.1:{words[words.index('--port') + 1]}"
    options = ["serve", str(other), "--engine", "vllm", "--behind", url, "--port", "0"]
    done = CliRunner().invoke(app, options, env={"PIPELINE_ENGINE_KEY": KEY})
    assert done.exit_code == EXIT_USER and "has other prompt sets" in " ".join(done.stderr.split()), done.output


def test_an_engine_that_is_killed_is_503_and_comes_back_by_itself(own: Running, front: Running) -> None:
    statuses = dict[int, str]()

    def ask(number: int) -> None:
        try:
            statuses[number] = "equal" if front.text(asked(number)) == own.text(asked(number)) else "other"
        except openai.InternalServerError as error:
            statuses[number] = str(error.status_code)

    killed = front.engine()
    with ThreadPoolExecutor(CLIENTS) as clients:
        pending = [clients.submit(ask, number) for number in range(60)]
        while len(statuses) < 20:
            time.sleep(0.01)
        for process in [*killed.children(recursive=True), killed]:
            process.kill()
        for one in pending:
            one.result()
    assert {*statuses.values()} == {"equal", "503"} and not front.healthy()
    deadline = time.monotonic() + STARTS_S
    while not front.healthy() and time.monotonic() < deadline:
        time.sleep(1)
    questions = [asked(number) for number in range(20)]
    assert answers(front, questions) == answers(own, questions)


def test_the_service_ends_its_engine(adapter: Path, front: Running) -> None:
    """Runs last: the service is not there afterwards."""
    started = [front.engine(), *front.engine().children(recursive=True)]
    front.process.send_signal(signal.SIGTERM)
    assert front.process.wait(90) == 0
    assert not [process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
