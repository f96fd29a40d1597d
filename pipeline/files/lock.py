"""Locks between processes, on one machine or on several with one file system, by `lockf` on a file of their own.

The operating system holds the lock, so it releases that of a dead process. Locks of `flock` are inherited by forked
processes: a DataLoader worker would keep holding one after its parent was killed. Those of `lockf` are not.
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
TOLD_EVERY_S = 60.0  # between two log lines that name the holder of a lock that is waited for


class FileLock:
    """A lock on `path` that at most one process holds; the file's content names the holder, for people only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIOWrapper | None = None

    def acquire(self) -> bool:
        """Take the lock and return True, or return False when another process holds it.

        On a file system without locks it logs a warning and returns True.
        """
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
        with contextlib.suppress(OSError):  # a full disk: the lock is held all the same, without its holder's name
            file.truncate(0)
            file.write(json.dumps(_self()) + "\n")
            file.flush()
        return True

    def is_held(self) -> bool:
        """Whether another process holds the lock; does not take it, and makes no file.

        A shared lock is tried for a moment, which needs only the right to read. The answer is False on a file system
        without locks, and where the file cannot be read.
        """
        try:
            with self.path.open(encoding="utf-8") as file:
                fcntl.lockf(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            # POSIX allows either for a lock that is held; EACCES of `open` is a file that this user may not read.
            return error.errno in (errno.EACCES, errno.EAGAIN) and error.filename is None
        return False

    def holder(self) -> str:
        """Describe the process that holds the lock."""
        try:
            told = self._content()
            job = f" (Slurm job {told['job']})" if told["job"] else ""
            return f"process {told['pid']} on {told['host']}{job}, since {told['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process, whose name is not in the lock's file"

    def held_elsewhere(self) -> bool:
        """Whether the lock's file names another machine as that of its holder."""
        try:
            return bool(self._content()["host"] != socket.gethostname())
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _content(self) -> Any:
        return json.loads(self.path.read_text("utf-8"))

    def release(self) -> None:
        """Release the lock; does nothing where it is not held."""
        if self._file is not None:
            self._file.close()
            self._file = None


def lock_of(folder: Path) -> Path:
    """The lock file of a prepared split's folder, beside it; held while a process writes into the folder."""
    return folder.with_name(f"{folder.name}.lock")


@contextlib.contextmanager
def waiting_for(path: Path, what: str) -> Iterator[None]:
    """Hold the lock `path` while the block runs; while another process holds it, wait and log that process and `what`.

    Must not be called by one rank of several: the others would reach their next collective and time out in it.
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
