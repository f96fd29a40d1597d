"""Being told to stop: a signal sets a flag, and whoever looks at it leaves at a place where nothing is lost.

Nothing heavy is imported here, so that a process can listen from its first second. All imports are at the top: a signal
may come in the middle of an import, when what is half imported cannot be used.
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
HEARD_S = 3.0  # in which a wait ends by itself, or the process that was told to stop meanwhile ends
LEFT_S = 60.0  # in which a process that leaves has closed what it had open


@dataclass
class StopFlag:
    """Set by a stop signal; the loop agrees on it with the other ranks at a step boundary."""

    requested: bool = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Catch the stop signals while the block runs, and restore the previous handlers after it.

    A second signal sets the flag that is set already: it cannot break off the saving that the first one caused.
    """
    flag = StopFlag()

    def handler(number: int, frame: object) -> None:
        flag.requested = True

    previous = {}
    for number in heeded(STOP_SIGNALS):
        # Handlers can only be set in the main thread; elsewhere (some test runners) the flag is simply never set.
        with contextlib.suppress(ValueError):
            previous[number] = signal.signal(number, handler)
    try:
        yield flag
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def leave_on_signals() -> None:
    """From now on end with "the same command goes on" when told to stop, until somebody can do better.

    For a process that is still importing, loading or preparing data: nothing of it is lost, and a scheduler must not
    take it for failed.
    """
    mine = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != mine:  # a forked child, which is nobody's rank: as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        message = "stopped by a signal before anything was trained; the same command goes on."
        if not leave_outcome(Outcome(EXIT_RESUMABLE, message)):
            print(f"stopped: {message}", file=sys.stderr, flush=True)
        # A library that catches whatever its imports raise must not keep the process alive.
        late = threading.Timer(LEFT_S, os._exit, [EXIT_RESUMABLE])
        late.daemon = True
        late.start()
        sys.exit(EXIT_RESUMABLE)

    for number in heeded(STOP_SIGNALS):
        signal.signal(number, leave)


@contextlib.contextmanager
def leave_from_wait(what: str) -> Iterator[None]:
    """End the process with "the same command goes on" when it is told to stop while the block waits in C++.

    Python runs its handlers between two of its own instructions, so a process that waits inside a library for peers
    that never come would hear no signal for as long as that may take. The interpreter writes the signal's number to a
    pipe at once, and a thread reads it from there. `what` says what the process waits for. Only the main thread can
    wait like this; in others the block just runs.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    ended = threading.Event()
    heard = {*heeded(STOP_SIGNALS), signal.SIGINT}

    def listen() -> None:
        while not ended.is_set():
            number = os.read(reading, 1)
            if number and number[0] in heard and not ended.wait(HEARD_S):
                _leave_at_once(f"stopped by a signal while waiting for {what}; the same command goes on.")

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


def heed_rank_alone(worker: int = 0) -> None:
    """Ignore stop signals that are not from the rank itself: for the workers of its DataLoader (`worker_init_fn`).

    Launchers and Slurm signal every process they find, and a rank whose worker dies cannot finish its step. The rank
    itself may end its workers with SIGTERM, and a worker whose rank is gone ends by itself.
    """
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
    rank = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in all threads: it waits for the one that asks

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def heeded(signals: tuple[signal.Signals, ...]) -> list[signal.Signals]:
    """The signals without a hang-up that this process was started to ignore, as `nohup` does."""
    return [n for n in signals if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
