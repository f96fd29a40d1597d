"""The quick part of the fault table, in a process of its own: it forks, which a test run with threads must not.

`make test-faults` runs the whole table.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT, LIMIT_S = Path(__file__).resolve().parents[2], 600


@pytest.mark.e2e
@pytest.mark.slow
def test_what_is_killed_hangs_or_cannot_write_loses_nothing() -> None:
    command = [sys.executable, "-m", "tests.faults", "--fast"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
