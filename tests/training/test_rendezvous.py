"""A rank whose peers never come hears a signal while it waits for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.errors import EXIT_RESUMABLE
from pipeline.ranks.environment import free_port
from pipeline.ranks.outcome import OUTCOMES
from tests.processes import PROJECT

WAITING = """
import sys, threading
from pipeline.ranks.world import init_world
from pipeline.ranks.shutdown import stop_on_signals
with stop_on_signals():
    print("waits", flush=True)
    init_world()
"""


def waits_in_cpp(process: subprocess.Popen[str]) -> None:
    """Return when the process has begun to wait: its listening thread is there and it uses no CPU."""
    assert process.stdout is not None
    assert process.stdout.readline() == "waits\n"
    inside = psutil.Process(process.pid)
    while inside.num_threads() < 2 or inside.cpu_percent(0.5) > 20:
        assert process.poll() is None


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (0, signal.SIGTERM),
        (1, signal.SIGUSR1),
        (0, signal.SIGINT),
        pytest.param(0, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_wait_for_other_ranks(rank: int, number: signal.Signals, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        OUTCOMES: str(tmp_path),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        waits_in_cpp(process)
        process.send_signal(number)
        assert process.wait(60) == EXIT_RESUMABLE
    finally:
        process.kill()
    told = json.loads((tmp_path / f"rank-{rank}.json").read_text())
    assert (
        told["error"] == "stopped by a signal while waiting for the other ranks; run the same command again to resume."
    )
