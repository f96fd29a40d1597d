"""A process of the command line ends after its exit handlers and before the interpreter's teardown."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.processes import PROJECT

PROGRAM = """
import atexit, sys
from pipeline.ranks.launch import end_as_rank

class TornDown:
    def __del__(self):
        print("torn down")

kept = TornDown()  # until the interpreter is torn down

def work():
    atexit.register(print, "handled")
    {last}

end_as_rank(work)
"""


def ended(last: str, **env: str) -> tuple[int, list[str], str]:
    """Exit code, lines of output and stderr of a process whose work ends with a statement."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(last=last)],
        cwd=PROJECT,
        env={**inherited, **env},
        timeout=60,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout.split("\n")[:-1], done.stderr


RANKS = pytest.mark.parametrize("rank", [{"RANK": "1", "WORLD_SIZE": "2"}, {}], ids=["of two", "alone"])


@RANKS
@pytest.mark.parametrize(
    ("last", "code"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(75)", 75), ("sys.exit('no')", 1)]
)
def test_it_runs_its_exit_handlers_and_keeps_its_exit_code_but_is_not_torn_down(
    last: str, code: int, rank: dict[str, str]
) -> None:
    assert ended(last, **rank)[:2] == (code, ["handled"])


@RANKS
def test_one_that_raises_says_so_and_fails(rank: dict[str, str]) -> None:
    code, lines, error = ended("raise ValueError('what went wrong')", **rank)
    assert (code, lines) == (1, ["handled"])
    assert "what went wrong" in error
