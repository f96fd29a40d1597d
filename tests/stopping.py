"""Telling a process to stop in the middle of a training, as a scheduler does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def signal_in_forward(model: type, call: int, number: int = signal.SIGUSR1, signals: int = 1) -> Iterator[None]:
    """While the block runs, send this process a signal during the given forward pass of all that `model` makes."""
    forward, calls = model.forward, 0  # type: ignore[attr-defined]

    def signalled(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        for _ in range(signals if calls == call else 0):
            os.kill(os.getpid(), number)
        return forward(self, *arguments)

    model.forward = signalled  # type: ignore[attr-defined]
    try:
        yield
    finally:
        model.forward = forward  # type: ignore[attr-defined]
