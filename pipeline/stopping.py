"""Being told to stop: a signal sets a flag, and whoever looks at it leaves at a place where nothing is lost.

Nothing heavy is imported here, so that a process can listen from its first second.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class StopFlag:
    """Set by SIGTERM or SIGUSR1; the loop agrees on it with the other ranks at a step boundary."""

    requested: bool = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Catch SIGTERM and SIGUSR1 while the block runs, and restore the previous handlers after it.

    A second signal sets the flag that is set already: it cannot break off the saving that the first one caused.
    """
    flag = StopFlag()

    def handler(number: int, frame: object) -> None:
        flag.requested = True

    previous = {}
    for number in STOP_SIGNALS:
        # Handlers can only be set in the main thread; elsewhere (some test runners) the flag is simply never set.
        with contextlib.suppress(ValueError):
            previous[number] = signal.signal(number, handler)
    try:
        yield flag
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
