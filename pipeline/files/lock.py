"""Locks between processes, on one machine or on several with one file system, by `lockf` on a file of their own.

The lock is the operating system's, so that of a dead process is gone by itself. It is `lockf`'s and not `flock`'s: the
latter is shared with forked processes, and a DataLoader worker would hold it on after its parent was killed.
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
from io import TextIOWrapper
from pathlib import Path
from typing import Any

log = logging.getLogger("pipeline.files.lock")
POLL_S = 0.2
TOLD_EVERY_S = 60.0  # while waiting, who is waited for is said this often


class FileLock:
    """A lock that at most one process holds; what it protects is named by its file, whose content is for people."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIOWrapper | None = None

    def acquire(self) -> bool:
        """Take the lock unless another process has it; where the file system knows no locks a warning says so."""
        if self._file is not None:
            return True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.close()
                return False
            log.warning(
                "%s cannot be locked (%s): the file system knows no locks, so make sure that no other process writes "
                "there.",
                self.path,
                error,
            )
        self._file = file
        with contextlib.suppress(OSError):  # a full disk: the lock holds without a name in it
            file.truncate(0)
            file.write(json.dumps(_self()) + "\n")
            file.flush()
        return True

    def holder(self) -> str:
        """Who holds the lock, in words."""
        try:
            told = self._content()
            job = f" (Slurm job {told['job']})" if told["job"] else ""
            return f"process {told['pid']} on {told['host']}{job}, since {told['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process, which has not said which"

    def held_elsewhere(self) -> bool:
        """Whether its holder says that it is on another machine."""
        try:
            return bool(self._content()["host"] != socket.gethostname())
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _content(self) -> Any:
        return json.loads(self.path.read_text("utf-8"))

    def release(self) -> None:
        """Give the lock up; nothing where it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None


def lock_of(folder: Path) -> Path:
    """The file whose lock a process holds while it writes into a prepared split's folder: beside it."""
    return folder.with_name(f"{folder.name}.lock")


@contextlib.contextmanager
def waiting_for(path: Path, what: str) -> Iterator[None]:
    """Hold the lock `path` while the block runs; waits for as long as another process has it, saying who and for what.

    Not for one rank of several: the others would wait in a collective operation meanwhile.
    """
    lock, told = FileLock(path), -TOLD_EVERY_S
    try:
        while not lock.acquire():
            if time.monotonic() - told >= TOLD_EVERY_S:
                told = time.monotonic()
                log.warning("waiting for %s, which is at work on %s", lock.holder(), what)
            time.sleep(POLL_S)
        yield
    finally:
        lock.release()


def _self() -> dict[str, object]:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID"), "since": now}
