"""Graceful shutdown: a stop signal sets a flag, which the training loop reads at step boundaries to save and exit.

Nothing heavy is imported here, so that a process can install the handlers before it loads torch. All imports are at
the top: a handler may run in the middle of another import, when importing inside it could meet a half-loaded module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from pipeline.errors import EXIT_RESUMABLE
from pipeline.ranks.outcome import Outcome, leave_outcome

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
HEARD_S = 3.0  # after a signal in `leave_from_wait`: time for the wait to end by itself before the process exits
LEFT_S = 60.0  # after sys.exit: time for the exit handlers before the process is ended by os._exit


@dataclass
class StopFlag:
    """Set by a stop signal; the training loop reduces it over the ranks at step boundaries."""

    requested: bool = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Set a flag on the stop signals while the block runs, and restore the previous handlers after it.

    Further signals only set the flag again, so they do not interrupt the saving that the first one caused.
    """
    flag = StopFlag()

    def handler(number: int, frame: object) -> None:
        flag.requested = True

    previous = {}
    for number in handled_signals(STOP_SIGNALS):
        # Python sets handlers in the main thread only; in another one (some test runners) the flag is never set.
        with contextlib.suppress(ValueError):
            previous[number] = signal.signal(number, handler)
    try:
        yield flag
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def leave_on_signals() -> None:
    """Exit with code 75 (resumable) on a stop signal, until another handler replaces this one.

    For a process that is still importing, loading or preparing data: no training is lost, and the exit code tells a
    scheduler that the job did not fail.
    """
    mine = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != mine:  # a forked child inherited the handler but is no rank: take the default action
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        message = "stopped by a signal before anything was trained; run the same command again to resume."
        if not leave_outcome(Outcome(EXIT_RESUMABLE, message)):
            print(f"stopped: {message}", file=sys.stderr, flush=True)
        # A library that catches every exception of its imports would swallow SystemExit, so a timer ends the process.
        late = threading.Timer(LEFT_S, os._exit, [EXIT_RESUMABLE])
        late.daemon = True
        late.start()
        sys.exit(EXIT_RESUMABLE)

    for number in handled_signals(STOP_SIGNALS):
        signal.signal(number, leave)


@contextlib.contextmanager
def leave_from_wait(what: str) -> Iterator[None]:
    """Exit with code 75 (resumable) on a stop signal while the block waits inside C++ code.

    Python runs signal handlers between two bytecode instructions, so a process that waits inside a library for peers
    runs none until the wait ends. With `signal.set_wakeup_fd` the interpreter writes the signal's number to a pipe at
    once, and a thread reads it. Outside the main thread, where this cannot be set, the block runs without it.

    Args:
        what: what the process waits for, for the message.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()
    heard = {*handled_signals(STOP_SIGNALS), signal.SIGINT}

    def listen() -> None:
        while not ended.is_set():
            number = os.read(reading, 1)
            if number and number[0] in heard and not ended.wait(HEARD_S):
                _leave_at_once(f"stopped by a signal while waiting for {what}; run the same command again to resume.")

    listening = threading.Thread(target=listen, name="signals", daemon=True)
    try:
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    except ValueError:  # not the main thread
        before = None
    else:
        listening.start()
    try:
        yield
    finally:
        ended.set()
        if before is not None:
            signal.set_wakeup_fd(before)
            os.write(writing, b"\0")
            listening.join()
        os.close(reading)
        os.close(writing)


def _leave_at_once(message: str) -> None:
    if not leave_outcome(Outcome(EXIT_RESUMABLE, message)):
        print(f"stopped: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(EXIT_RESUMABLE)


def ignore_signals_from_others(worker: int = 0) -> None:
    """Ignore stop signals that its rank did not send; the `worker_init_fn` of a rank's DataLoader.

    Launchers and Slurm signal every process of a job, and a rank whose worker dies cannot finish its step. The rank may
    still end its workers with SIGTERM; a worker whose rank is gone is ended by torch.
    """
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
    rank = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for `sigwaitinfo`, which takes blocked signals

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def handled_signals(signals: tuple[signal.Signals, ...]) -> list[signal.Signals]:
    """The signals to handle: all but a SIGHUP that this process was started to ignore, as `nohup` does."""
    return [n for n in signals if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
