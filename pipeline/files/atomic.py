"""Atomic writing of files and folders, and content hashes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

TEMPORARY_SUFFIX = ".tmp"
NFS_OPEN = ".nfs"  # prefix of the names that an NFS client gives to removed files which are still open
OLD_S = 24 * 3600.0  # age at which a temporary of another machine counts as a dead process's
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
_counter = itertools.count()  # tells the temporaries of two threads apart that write one file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it is renamed to `path` when the block ends without error.

    Every writer has a temporary of its own, so several may replace one file at the same time; the last one's content
    stays. Permissions are those of the umask, because safetensors creates its files with mode 0600.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        if temporary.stat().st_mode & 0o777 != mode:
            temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # before the rename: after a power cut the new name must not have an old content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def empty_folder(path: Path) -> Path:
    """Make an empty folder `path` and remove what was in it; UserError when that cannot be removed.

    Over NFS a removed file that a process still has open is renamed to `.nfs*`, and stays in its folder until it is
    closed. Such files are ignored.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    left = sorted(found.name for found in path.iterdir() if not found.name.startswith(NFS_OPEN))
    if left:
        raise UserError(f"'{path}' is left of an earlier attempt and '{left[0]}' in it cannot be removed; remove it.")
    return path


def remove_folder(path: Path) -> None:
    """Rename a folder, which frees its name at once, and remove it; over NFS open files stay (see `empty_folder`)."""
    gone = temporary_of(path)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def temporary_of(path: Path) -> Path:
    """A name beside `path` that no other process or thread uses: `<name>.<host>.<pid>.<number>.tmp`."""
    return path.with_name(f"{path.name}.{_HOST}.{os.getpid()}.{next(_counter)}{TEMPORARY_SUFFIX}")


def sweep_temporaries(folder: Path) -> None:
    """Remove the temporaries of killed writers from a folder and keep those of running processes.

    A temporary of this machine is stale when its process is gone, one of another machine when it is a day old.
    """
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        if not _is_stale(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_stale(path: Path) -> bool:
    *_, host, pid, _ = ("", "", *path.name.removesuffix(TEMPORARY_SUFFIX).split("."))
    if host == _HOST and pid.isdecimal():
        return not _is_running(int(pid))
    try:
        return time.time() - path.stat().st_mtime > OLD_S
    except OSError:  # its writer has just renamed or removed it
        return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process belongs to another user
        return True
    return True


def write_if_other(path: Path, content: str) -> None:
    """Write a text file atomically unless it has this content already, so that its modification time stays."""
    encoded = content.encode("utf-8")
    try:
        if path.stat().st_size == len(encoded) and path.read_bytes() == encoded:
            return
    except OSError:
        pass
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and flush it to the disk (fsync); raises OSError, which names the file, when the disk is full."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk (fsync); a rename in it may otherwise be lost in a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_space(path: Path) -> int:
    """Free bytes on the file system that holds `path`, or will hold it."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
    return shutil.disk_usage(there).free


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
