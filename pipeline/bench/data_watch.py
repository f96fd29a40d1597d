"""Runs a command and measures its process from outside: time, private memory, open files."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

EVERY_S = 0.02
MIB = 1 << 20


@dataclass(frozen=True)
class Watched:
    """Measurements of one process with its threads."""

    seconds: float  # from its start to its end, or to the awaited event
    processor_s: float
    own_bytes: int  # peak of private memory, without pages of mapped files
    open_files: int  # peak
    output: str

    def to_json(self) -> dict[str, Any]:
        """The measurements as they are printed."""
        return {
            "seconds": round(self.seconds, 2),
            "processor_s": round(self.processor_s, 2),
            "own_mib": round(self.own_bytes / MIB, 1),
            "open_files": self.open_files,
        }


def watch(
    command: Sequence[str],
    folder: Path,
    env: Mapping[str, str],
    reached: Callable[[], bool] | None = None,
    allowed: Sequence[int] = (0,),
) -> Watched:
    """Run `command` in `folder` to its end, or until `reached()`, when it is killed.

    Raises RuntimeError with the end of its output when it ends with another code than the `allowed` ones, or before
    `reached()`.
    """
    log = folder / "watched.log"
    own, files, spent, began = 0, 0, 0.0, time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=dict(env), stdout=out, stderr=subprocess.STDOUT)
        seen = psutil.Process(process.pid)
        there = False
        while process.poll() is None and not there:
            there = reached is not None and reached()
            open_now, spent_now = _seen(seen)
            own, files, spent = max(own, own_memory(process.pid)), max(files, open_now), max(spent, spent_now)
            time.sleep(0 if there else EVERY_S)
        seconds = time.perf_counter() - began
        process.kill()  # no effect where it has ended by itself
        process.wait()
    output = log.read_text("utf-8", errors="replace")
    if not there and (reached is not None or process.returncode not in allowed):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-4000:]}")
    return Watched(seconds, spent, own, files, output)


def own_memory(pid: int) -> int:
    """Private bytes of a process; all resident bytes where the system does not distinguish mapped files."""
    if sys.platform == "linux":
        try:
            lines = Path(f"/proc/{pid}/status").read_text("ascii", errors="replace").splitlines()
        except OSError:
            return 0
        kept = [line.split()[1] for line in lines if line.startswith(("RssAnon:", "RssShmem:"))]
        return 1024 * sum(map(int, kept))
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _seen(process: psutil.Process) -> tuple[int, float]:
    """(open files, processor seconds) of a process; zeros once it has ended."""
    try:
        times = process.cpu_times()
        return int(process.num_fds()), times.user + times.system
    except psutil.Error:
        return 0, 0.0
