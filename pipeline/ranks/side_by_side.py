"""Runs commands of this project as processes of their own, several at once; one that fails does not end the others."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from pipeline.errors import EXIT_OK
from pipeline.ranks.shutdown import STOP_SIGNALS, handled_signals

POLL_S = 0.1
PARENT_DEATH_SIGNAL = 1  # of prctl(2)


@dataclass(frozen=True)
class Command:
    """A command `python -m pipeline ARGUMENTS`, and the file that its output is added to."""

    title: str
    arguments: Sequence[str]
    log: Path


@dataclass(frozen=True)
class Ended:
    """How a command ended; `error` is its own sentence, "" of one that succeeded or said none."""

    command: Command
    code: int
    error: str = ""


@dataclass
class SideBySide:
    """Runs commands, at most one at each of the `places`: variables of the environment, such as which GPUs it sees.

    `began` and `ended` are called for every command, `waits` in every round of waiting, with those that run. On a stop
    signal the running commands get SIGTERM, no further one is started, and `stopped` is set.
    """

    places: Sequence[Mapping[str, str]]
    began: Callable[[Command], object] = lambda _: None
    ended: Callable[[Ended], object] = lambda _: None
    waits: Callable[[Sequence[Command]], object] = lambda _: None
    stopped: bool = False
    _running: dict[int, tuple[Command, subprocess.Popen[bytes]]] = field(default_factory=dict, repr=False)

    def run(self, commands: Sequence[Command]) -> list[Ended]:
        """Run the commands in this order and return how each ended; without those that a stop left out."""
        waiting, found, told = list(commands), list[Ended](), set[int]()
        with self._told_to_stop():
            while self._running or (waiting and not self.stopped):
                for place in range(len(self.places)):
                    if place not in self._running and waiting and not self.stopped:
                        command = waiting.pop(0)
                        self._running[place] = (command, self._start(command, place))
                        self.began(command)
                for place, (command, process) in list(self._running.items()):
                    if self.stopped and place not in told:
                        told.add(place)
                        process.terminate()
                    code = process.poll()
                    if code is not None:
                        del self._running[place]
                        error = "" if code == EXIT_OK else last_words(command.log)
                        found.append(Ended(command, code, error))
                        self.ended(found[-1])
                self.waits([command for command, _ in self._running.values()])
                time.sleep(POLL_S)
        return found

    def _start(self, command: Command, place: int) -> subprocess.Popen[bytes]:
        command.log.parent.mkdir(parents=True, exist_ok=True)
        with command.log.open("ab") as log:
            # In a session of its own, so that a Ctrl-C reaches it through this process alone.
            return subprocess.Popen(
                [sys.executable, "-m", "pipeline", *command.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.places[place]},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    @contextlib.contextmanager
    def _told_to_stop(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self.stopped = True

        before = {number: signal.signal(number, stop) for number in handled_signals((signal.SIGINT, *STOP_SIGNALS))}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when its parent is killed; otherwise it would keep its run's lock.

    Linux alone has this; elsewhere the process goes on to its end.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def last_words(log: Path) -> str:
    """The error of a command that ran with --json: that of the object on its last line; "" without one."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, IndexError):
        last = log.read_text("utf-8", errors="replace").rstrip().splitlines()[-1]
        return str(json.loads(last).get("error") or "")
    return ""


def shared_places(places: int, ranks: int, devices: Sequence[str]) -> list[dict[str, str]]:
    """The environments of `places` commands at once: the GPUs divided among them, or the CPUs where there are none.

    Args:
        places: commands at once.
        ranks: processes of each, among which its CPUs are divided.
        devices: the visible GPUs, as CUDA_VISIBLE_DEVICES names them.
    """
    if devices:
        each = len(devices) // places
        return [{"CUDA_VISIBLE_DEVICES": ",".join(devices[n * each : (n + 1) * each])} for n in range(places)]
    cores = max(1, len(os.sched_getaffinity(0)) // (places * ranks))
    threads = {} if "OMP_NUM_THREADS" in os.environ or places == 1 else {"OMP_NUM_THREADS": str(cores)}
    return [threads for _ in range(places)]
