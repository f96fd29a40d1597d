"""The fault table's quick part, in a process of its own: it forks, which a test run with threads must not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT, LIMIT_S = Path(__file__).resolve().parents[2], 3600


def faults(*options: str) -> None:
    command = [sys.executable, "-m", "tests.faults", *options]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


@pytest.mark.e2e
def test_what_is_killed_hangs_or_cannot_write_loses_nothing() -> None:
    faults("--fast")


@pytest.mark.slow
@pytest.mark.gloo
def test_every_row_of_the_fault_table_behaves_as_documented() -> None:
    faults("--kills", "12")
