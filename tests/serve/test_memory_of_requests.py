"""What a request of any kind may make the real process take: its peak, read from the system, over what it took idle."""

from __future__ import annotations

import http.client
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.adapter.answering import Question
from tests import tiny, tiny_clip
from tests.adapters import question, save_adapter, save_models
from tests.serve import hostile
from tests.serve.conftest import address_of, drain, start
from tests.serve.test_openai_client import messages

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of a process is read from /proc"),
]
MOST = 200 << 20  # bytes above idle
TIMEOUT_S = 120


@dataclass
class Watched:
    """A running service whose memory is looked at."""

    process: Any
    port: int

    def ask(self, body: bytes, head: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        try:
            connection.request(
                "POST", "/v1/chat/completions", body, {"Content-Type": "application/json", **(head or {})}
            )
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def rss(self) -> int:
        return psutil.Process(self.pid).memory_info().rss

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def peak(self) -> int:
        (line,) = (line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if "VmHWM" in line)
        return int(line.split()[1]) << 10


def ordinary(asked: Question) -> bytes:
    return json.dumps({"model": hostile.MODEL, "messages": messages(asked)}).encode()


@pytest.fixture(scope="module", params=["none", "square"])
def watched(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A service whose models see images of real size, and that has answered before."""
    with pytest.MonkeyPatch.context() as patched:
        # 336 pixels as LLaVA-1.5's tower sees them, in few patches: the memory of images is what is measured.
        patched.setattr(tiny, "IMAGE_SIZE", 336)
        patched.setattr(tiny, "PATCH", 112)
        patched.setattr(tiny_clip, "IMAGE_SIZE", 336)
        folder = tmp_path_factory.mktemp("watched")
        adapter = save_adapter(folder / hostile.MODEL, save_models(folder))
    meta = json.loads((adapter / "adapter.json").read_text())
    meta["model"]["image_padding"] = request.param
    (adapter / "adapter.json").write_text(json.dumps(meta))
    process = start(adapter, "--max-body", str(hostile.BODY))
    try:
        service = Watched(process, int(address_of(process).rpartition(":")[2]))
        drain(process)
        for number in range(6):
            status, reply = service.ask(ordinary(question(number % 3, variant=number)))
            assert status == 200, reply
        yield service
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def check(watched: Watched, seed: int, number: int) -> None:
    idle, worst, seen, wrong = watched.rss(), dict[str, int](), dict[int, int](), list[str]()
    for name, body in hostile.requests(seed, number):
        watched.forget_peak()
        status, reply = watched.ask(body)
        above = watched.peak() - idle
        worst[name] = max(worst.get(name, 0), above >> 20)
        seen[status] = seen.get(status, 0) + 1
        if above >= MOST or status not in (200, 400, 404, 413):
            wrong.append(f"{name}, {len(body)} bytes: {above >> 20} MiB above idle, {status} {str(reply)[:300]}")
    print(f"seed {seed}, {number} requests, statuses {seen}; MiB above idle: {worst}")
    assert not wrong, "\n".join(wrong)
    status, _ = watched.ask(ordinary(question(1)))
    assert status == 200
    assert seen[200] and seen[400] and seen[413], seen


def test_a_request_of_any_kind_takes_bounded_memory(watched: Watched) -> None:
    check(watched, seed=0, number=60)


@pytest.mark.slow
def test_hundreds_of_requests_of_every_kind_take_bounded_memory(watched: Watched) -> None:
    check(watched, seed=1, number=520)
