"""One writer per run folder: rank 0 holds a lock on a file in it for as long as its process works there.

The lock is the operating system's, so that of a dead process is gone by itself. It is `lockf`'s and not `flock`'s: the
latter is shared with forked processes, and a DataLoader worker would hold it on after its rank was killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from pipeline.checkpoint import claim_run
from pipeline.distributed import World, on_main
from pipeline.errors import UserError
from pipeline.recipe_base import FileRecipe

log = logging.getLogger("pipeline.run_lock")
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
    path = run / LOCK
    with path.open("a+", encoding="utf-8") as file:
        until = time.monotonic() + WAIT_S
        while not _locked(file.fileno(), run):
            if time.monotonic() >= until:
                file.seek(0)
                raise UserError(
                    f"The run folder {run} is in use by {_holder(file.read())}. Two processes must not write to one "
                    "run: wait until it has ended, or end it, or set run_dir to another folder. If that machine is "
                    f"gone for good, remove {path}."
                )
            time.sleep(0.2)
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
            file.truncate(0)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            job = os.environ.get("SLURM_JOB_ID")
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": now}) + "\n")
            file.flush()
        yield


def _locked(handle: int, run: Path) -> bool:
    """Whether this process has the lock now, or can go on without one."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        log.warning(
            "%s cannot be locked (%s): the file system knows no locks, so make sure that no other process writes to "
            "this run.", run, error,
        )  # fmt: skip
    return True


def _holder(content: str) -> str:
    try:
        told = json.loads(content)
        job = f" (Slurm job {told['job']})" if told["job"] else ""
        return f"process {told['pid']} on {told['host']}{job}, since {told['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process, which has not said which"
