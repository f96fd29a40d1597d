"""Python's garbage collector of this process."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """While the block runs, no cycles are looked for: for imports and loading, which make objects that stay.

    The collector looks through all objects again and again as their number grows, a sixth of the time of such a block.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
