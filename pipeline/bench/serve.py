"""Services under load: concurrent clients of processes on loopback, against `predict` one question at a time."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.adapter.answering import Answerer, Question
from pipeline.adapter.load import load_adapter
from pipeline.bench import measure
from pipeline.bench.noise import draw_jpeg
from pipeline.config.paths import PROJECT
from pipeline.errors import UserError
from pipeline.serve.options import KEY_VARIABLE

MODEL = "bench"
TIMEOUT_S = 300.0  # for one request
STOP_S = 30.0  # for the service to end
ROUNDS = 4
PICTURES = 16  # distinct images; all questions are distinct
ALONE = "one by one"
# What answers by name, and the options of `serve` that say so.
ENGINES: Mapping[str, tuple[str, ...]] = {
    "own": (),
    "vocabulary": ("--engine", "vllm", "--sets", "vocabulary"),
    "parts": ("--engine", "vllm", "--sets", "parts"),
}


@dataclass(frozen=True)
class Engines:
    """What answers: some of ENGINES, and how vLLM is started for two of them."""

    names: Sequence[str] = ("own",)
    vllm: Path | None = None  # the command of another environment
    arguments: str = ""  # further options of `vllm serve`

    def options(self, name: str, folder: Path) -> list[str]:
        """The options of `serve` for one of the names; an export for vLLM is written into `folder`."""
        if name == "own":
            return []
        found = [*ENGINES[name], "--checkpoint", str(folder / name), f"--engine-args={self.arguments}"]
        return found if self.vllm is None else [*found, "--vllm", str(self.vllm)]


@dataclass(frozen=True)
class _Asked:
    """Results of one variant: answers in the order of the questions, and their latencies."""

    answers: list[str]
    latencies: list[float]
    seconds: float

    @classmethod
    def joined(cls, rounds: Sequence[_Asked]) -> _Asked:
        """Several rounds as one."""
        answers = [answer for asked in rounds for answer in asked.answers]
        latencies = [latency for asked in rounds for latency in asked.latencies]
        return cls(answers, latencies, sum(asked.seconds for asked in rounds))


def bench_serve(folder: Path, clients: int = 16, requests: int = 128, engines: Engines | None = None) -> dict[str, Any]:
    """Send `requests` questions to services of a run or adapter from `clients` threads, and to `predict` one by one.

    Every other question has a noise image. All services run side by side, and the variants alternate for up to four
    rounds, the others idle while one is measured; ratios are medians over the rounds. Raises UserError for a folder
    that cannot be served, and for an engine that does not start.
    """
    engines = engines or Engines()
    answerer = load_adapter(folder)
    needs_task = answerer.method.needs_task
    task = answerer.pool.names[0] if needs_task else None
    pictures = [draw_jpeg(number) for number in range(PICTURES)]
    questions = [
        Question(f"What is in picture {number}?", None if number % 2 else pictures[number // 2 % PICTURES], task)
        for number in range(requests)
    ]
    with ExitStack() as running:
        place = Path(running.enter_context(TemporaryDirectory(prefix="bench-serve-")))
        ports = {n: running.enter_context(service(folder, options=engines.options(n, place)))[0] for n in engines.names}
        answerer.answer(questions[:2])  # warms up
        for port in ports.values():
            _ask_service(port, questions[:2], 1)
        rounds = list[dict[str, _Asked]]()
        for part in np.array_split(range(requests), max(1, min(ROUNDS, requests // clients))):
            asked = [questions[number] for number in part]
            found = {ALONE: _ask_here(answerer, asked)}
            found |= {name: _ask_service(port, asked, clients) for name, port in ports.items()}
            rounds.append(found)
            measure.tell(f"{len(asked)} questions: " + ", ".join(f"{n} {f.seconds:.1f} s" for n, f in found.items()))
    variants = {name: _Asked.joined([found[name] for found in rounds]) for name in (ALONE, *ports)}
    expected = variants[ALONE].answers
    same = {name: _share_of_equal(expected, variants[name].answers) for name in ports}
    ratios = {
        name: {"requests_per_s": round(statistics.median(f[ALONE].seconds / f[name].seconds for f in rounds), 2)}
        for name in ports
    }
    return {
        "folder": folder.name,
        "clients": clients,
        "requests": requests,
        "machine": measure.machine(answerer.lmm.model.device.type),
        "variants": {name: _numbers(asked) for name, asked in variants.items()},
        "ratios": {ALONE: ratios},
        "same_answers": same,
    }


def _share_of_equal(expected: Sequence[str], found: Sequence[str]) -> float:
    """The share of equal answers; vLLM leaves a space at the start of a text, which the own engine takes off."""
    return round(sum(one == other.strip() for one, other in zip(expected, found, strict=True)) / len(expected), 4)


@contextmanager
def service(folder: Path, checkout: Path = PROJECT, options: Sequence[str] = ()) -> Iterator[tuple[int, int]]:
    """Start a checkout's service in a process of its own for the block; yields its port on loopback, and its id."""
    command = [sys.executable, "-m", "pipeline", "serve", str(folder), "--port", "0", "--name", MODEL, "--quiet"]
    command += options
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    environment["PYTHONSAFEPATH"] = "1"  # the checkout's modules, not those of the working directory
    paths = filter(None, [str(checkout), os.environ.get("PYTHONPATH")])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**environment, "PYTHONPATH": os.pathsep.join(paths)}
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # arrives when the service listens; empty when it ends
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise UserError(f"The service of '{folder}' did not start ({line.strip() or 'no output'}); see above why.")
        yield int(found.group(1)), process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _ask_here(answerer: Answerer, questions: Sequence[Question]) -> _Asked:
    """All questions one at a time, as `predict` answers them."""
    began, answers, latencies = time.perf_counter(), list[str](), list[float]()
    for question in questions:
        before = time.perf_counter()
        answers.append(answerer.answer([question])[0].text)
        latencies.append(time.perf_counter() - before)
    return _Asked(answers, latencies, time.perf_counter() - began)


def _ask_service(port: int, questions: Sequence[Question], clients: int) -> _Asked:
    """All questions from `clients` threads, each with one connection and one open request."""
    answers, latencies = [""] * len(questions), [0.0] * len(questions)

    def client(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        for number in range(first, len(questions), clients):
            before = time.perf_counter()
            connection.request(
                "POST", "/v1/chat/completions", _body(questions[number]), {"Content-Type": "application/json"}
            )
            reply = connection.getresponse()
            content = reply.read()
            if reply.status != 200:
                raise RuntimeError(f"The service replied {reply.status} to question {number + 1}: {content[:500]!r}")
            answers[number] = json.loads(content)["choices"][0]["message"]["content"]
            latencies[number] = time.perf_counter() - before
        connection.close()

    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(client, range(clients)))
    return _Asked(answers, latencies, time.perf_counter() - began)


def _numbers(asked: _Asked) -> dict[str, float]:
    p50, p95 = np.percentile(asked.latencies, [50, 95])
    return {
        "seconds": round(asked.seconds, 3),
        "requests_per_s": round(len(asked.latencies) / asked.seconds, 2),
        "latency_p50_s": round(float(p50), 4),
        "latency_p95_s": round(float(p95), 4),
    }


def _body(question: Question) -> bytes:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question.text}]
    if question.image is not None:
        address = "data:image/jpeg;base64," + base64.b64encode(question.image).decode()
        parts.append({"type": "image_url", "image_url": {"url": address}})
    fields = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "task": question.task}
    return json.dumps(fields).encode()
