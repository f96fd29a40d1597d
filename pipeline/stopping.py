"""Being told to stop: a signal sets a flag, and whoever looks at it leaves at a place where nothing is lost.

Nothing heavy is imported here, so that a process can listen from its first second.
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

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


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
    # Not when the signal comes: it may come in the middle of an import, and what is half imported cannot be used.
    from pipeline.launch import Outcome, leave_outcome

    mine = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != mine:  # a forked child, which is nobody's rank: as if there were no handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        message = "stopped by a signal before anything was trained; the same command goes on."
        if not leave_outcome(Outcome(EXIT_RESUMABLE, message)):
            print(f"stopped: {message}", file=sys.stderr, flush=True)
        sys.exit(EXIT_RESUMABLE)

    for number in heeded(STOP_SIGNALS):
        signal.signal(number, leave)


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
