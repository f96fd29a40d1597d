"""Starting the command line, and ranks, as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]

# By them a process knows that it is a rank: a test in this process may have been one.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def program(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m pipeline ARGUMENTS` in a folder, started by no launcher; what it printed and its exit code."""
    inherited = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    env = {**inherited, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=1500)


def torchrun(arguments: list[str], ranks: int, limit_s: float) -> None:
    """Run `python ARGUMENTS` (a script, or -m and a module) on so many CPU ranks, which all have to succeed in time."""
    env = {**os.environ, "LOCAL_SIZE": str(ranks), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *arguments]
    done = subprocess.run(command, cwd=PROJECT, env=env, timeout=limit_s, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
