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


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """`collector_paused` for a block that imports modules, whose objects are the oldest generation's afterwards.

    As young objects all of them, a quarter of a million with transformers, would be looked through right after the
    block. Not where the program itself keeps objects frozen, because they would be thawed.
    """
    with collector_paused():
        yield
        if not gc.get_freeze_count():
            gc.freeze()  # all objects become permanent
            gc.unfreeze()  # and these the oldest generation's
