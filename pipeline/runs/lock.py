"""One writer per run folder: rank 0 holds a lock on a file in it for as long as its process works there."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.config.base import FileRecipe
from pipeline.errors import Interrupted, UserError
from pipeline.files.atomic import sweep_temporaries
from pipeline.files.lock import POLL_S, FileLock
from pipeline.ranks.shutdown import StopFlag
from pipeline.ranks.world import World, on_main
from pipeline.runs.claim import claim_run, unbegun
from pipeline.runs.layout import CONFIG, LOCK

log = logging.getLogger(__name__)
WAIT_S = 20.0  # for a holder that is just ending
# For a holder on another machine, which may have failed: file servers keep the locks of a client that does not answer
# for its lease (NFS: 90 s) or until they give it up (Lustre: 100 s and more).
WAIT_ELSEWHERE_S = 300.0


@contextlib.contextmanager
def claimed(recipe: FileRecipe, world: World, stop: StopFlag | None = None) -> Iterator[Path]:
    """Yield the run folder of a recipe (see `claim_run`), which no other process writes to while the block runs.

    Raises, on all ranks, what `locked` raises when another process holds it.
    """
    with contextlib.ExitStack() as held:

        def claim() -> Path:
            run = claim_run(recipe)
            held.enter_context(locked(run, stop))
            claim_run(recipe)  # once more: whoever held the lock meanwhile may have begun something
            if unbegun(run):
                recipe.dump_yaml(run / CONFIG)
            return run

        yield on_main(world, claim)


@contextlib.contextmanager
def locked(run: Path, stop: StopFlag | None = None) -> Iterator[None]:
    """Hold the lock of a run folder while the block runs.

    Raises UserError when another process of this machine keeps it for longer than `WAIT_S`. One on another machine may
    be gone with its node, and its lock goes later: for that it waits `WAIT_ELSEWHERE_S`, and then raises Interrupted,
    so that a job is queued again. Interrupted also when `stop` is set meanwhile.

    Where the file system knows no locks a warning says so, and the block runs all the same.
    """
    # The file says who holds it, for people; the lock itself is not in its content.
    lock, began, told = FileLock(run / LOCK), time.monotonic(), False
    try:
        while not lock.acquire():
            holder, elsewhere, waited = lock.holder(), lock.held_elsewhere(), time.monotonic() - began
            if stop is not None and stop.requested:
                raise Interrupted(f"Stopped while waiting for {holder}; run the same command again to go on.")
            if elsewhere and waited >= WAIT_ELSEWHERE_S:
                raise Interrupted(
                    f"The run folder {run} has been in use by {holder} for {waited:.0f} s. If that is another job of "
                    "this run, let it end or end it; if the machine has failed, its lock goes when the file server "
                    f"notices. The same command goes on then. If the machine is gone for good, remove {lock.path}."
                )
            if not elsewhere and waited >= WAIT_S:
                raise UserError(
                    f"The run folder {run} is in use by {holder}. Two processes must not write to one run: wait until "
                    "it has ended, or end it, or set run_dir to another folder. If that machine is gone for good, "
                    f"remove {lock.path}."
                )
            if elsewhere and not told:
                told = True
                log.warning("run folder in use by %s; waiting for it up to %.0f s", holder, WAIT_ELSEWHERE_S)
            time.sleep(POLL_S)
        sweep_temporaries(run)
        yield
    finally:
        lock.release()
