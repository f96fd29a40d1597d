"""One writer per run folder: rank 0 holds a file lock while its process works on the run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import Interrupted, UserError
from pipeline.files.atomic import sweep_temporaries
from pipeline.files.lock import POLL_S, FileLock
from pipeline.ranks.shutdown import StopFlag
from pipeline.runs.layout import LOCK

log = logging.getLogger(__name__)
WAIT_S = 20.0  # for a process on this machine that is about to end
# For a process on another machine, which may have failed: a file server keeps the locks of an unresponsive client for
# the client's lease (NFS: 90 s) or until it evicts the client (Lustre: 100 s and more).
WAIT_ELSEWHERE_S = 300.0


@contextlib.contextmanager
def locked(run: Path, stop: StopFlag | None = None) -> Iterator[None]:
    """Hold the lock of a run folder while the block runs.

    Raises UserError when another process of this machine holds it for longer than `WAIT_S`. A process on another
    machine may have ended with its node, and the file server releases its lock later: this waits `WAIT_ELSEWHERE_S`
    and then raises Interrupted, so that the job is queued again. Raises Interrupted also when `stop` is set.

    On a file system without locks it logs a warning and runs the block.
    """
    lock, began, told = FileLock(run / LOCK), time.monotonic(), False
    try:
        while not lock.acquire():
            holder, elsewhere, waited = lock.holder(), lock.held_elsewhere(), time.monotonic() - began
            if stop is not None and stop.requested:
                raise Interrupted(f"Stopped while waiting for {holder}; run the same command again to resume.")
            if elsewhere and waited >= WAIT_ELSEWHERE_S:
                raise Interrupted(
                    f"The run folder {run} has been in use by {holder} for {waited:.0f} s. If that is another job of "
                    "this run, let it end or end it; if the machine has failed, its lock goes when the file server "
                    f"notices. Then run the same command again. If the machine is gone for good, remove {lock.path}."
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
