"""A service on a tiny adapter in a process of its own, and what it should answer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.adapter.answering import Answerer
from pipeline.adapter.load import load_adapter
from pipeline.config.paths import PROJECT
from tests.adapters import save_adapter, save_models


@dataclass
class Served:
    """A running service."""

    process: Any
    url: str
    name: str
    answerer: Answerer  # the same adapter in this process

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return save_adapter(folder / "tiny-adapter", save_models(folder))


@pytest.fixture(scope="session")
def answerer(adapter: Path) -> Answerer:
    return load_adapter(adapter)


@pytest.fixture(scope="session")
def served(adapter: Path, answerer: Answerer) -> Iterator[Served]:
    process = start(adapter)
    try:
        url = address_of(process)
        drain(process)
        yield Served(process, url, adapter.name, answerer)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def start(adapter: Path, *options: str, verb: str = "serve", **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipeline", verb, str(adapter), "--port", "0", *options]
    env = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def address_of(process: subprocess.Popen[str]) -> str:
    """The address in the line that a service prints once it listens."""
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    found = re.search(r"http://\S+?:\d+", line)
    assert found, line + process.stderr.read()
    return found.group(0)


def drain(process: subprocess.Popen[str]) -> None:
    """Read what a service logs from now on: a pipe that is full would stop it in the middle of a line."""
    assert process.stderr is not None
    threading.Thread(target=process.stderr.read, daemon=True).start()
