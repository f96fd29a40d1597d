"""One writer per run folder: rank 0 holds a lock on a file in it for as long as its process works there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.checkpoint import claim_run
from pipeline.distributed import World, on_main
from pipeline.errors import UserError
from pipeline.file_lock import POLL_S, FileLock
from pipeline.files import sweep_temporaries
from pipeline.recipe_base import FileRecipe

LOCK = "LOCK"  # in the run folder: who holds it, for people; the lock itself is not in its content
WAIT_S = 20.0  # for a holder that is just ending, or whose node has just failed


@contextlib.contextmanager
def claimed(recipe: FileRecipe, world: World) -> Iterator[Path]:
    """Yield the run folder of a recipe (see `claim_run`), which no other process writes to while the block runs.

    Raises UserError, on all ranks, when another process holds it.
    """
    with contextlib.ExitStack() as held:

        def claim() -> Path:
            run = claim_run(recipe)
            held.enter_context(locked(run))
            return run

        yield on_main(world, claim)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder; UserError when somebody else keeps it for longer than `WAIT_S`.

    Where the file system knows no locks a warning says so, and the block runs all the same.
    """
    lock, until = FileLock(run / LOCK), time.monotonic() + WAIT_S
    try:
        while not lock.acquire():
            if time.monotonic() >= until:
                raise UserError(
                    f"The run folder {run} is in use by {lock.holder()}. Two processes must not write to one run: wait "
                    "until it has ended, or end it, or set run_dir to another folder. If that machine is gone for "
                    f"good, remove {lock.path}."
                )
            time.sleep(POLL_S)
        sweep_temporaries(run)
        yield
    finally:
        lock.release()
