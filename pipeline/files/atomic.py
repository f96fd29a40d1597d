"""Files that are whole or not there: atomic writing and content hashes."""

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
NFS_OPEN = ".nfs"  # how the names of removed files begin that somebody has open
OLD_S = 24 * 3600.0  # a temporary of another machine is taken for a dead process's when it is this old
_HOST = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:40]
_counter = itertools.count()  # two threads may write one file


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; it takes the name `path` when the block ends without error.

    Every writer has a temporary of its own, so several may replace one file: the last one's content stays, whole. The
    file may be read by whom the umask says, whatever writes it: safetensors' own files are for their owner alone.
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
            os.fsync(file.fileno())  # the name must not survive a power cut that the content did not
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def empty_folder(path: Path) -> Path:
    """Make an empty folder `path`, whatever is there; UserError when that cannot be removed.

    Over NFS a file that somebody has open is only renamed to `.nfs*` when it is removed, and its folder stays with it
    until it is closed. Such a file is nobody's content any more.
    """
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    left = sorted(found.name for found in path.iterdir() if not found.name.startswith(NFS_OPEN))
    if left:
        raise UserError(f"'{path}' is left of an earlier attempt and '{left[0]}' in it cannot be removed; remove it.")
    return path


def remove_folder(path: Path) -> None:
    """Free the name of a folder and remove it, as far as nobody has files in it open (see `empty_folder`)."""
    gone = temporary_of(path)
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def temporary_of(path: Path) -> Path:
    """A name beside `path` that no other process or thread uses: `<name>.<host>.<pid>.<number>.tmp`."""
    return path.with_name(f"{path.name}.{_HOST}.{os.getpid()}.{next(_counter)}{TEMPORARY_SUFFIX}")


def sweep_temporaries(folder: Path) -> None:
    """Remove the temporaries that killed writers left in a folder; those of running processes stay.

    A temporary of this machine is stale when its process is gone, any other one when it is a day old.
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
    except OSError:  # its writer was just done with it
        return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_if_other(path: Path, content: str) -> None:
    """Write a text file atomically, unless it has this content already."""
    encoded = content.encode("utf-8")
    try:
        if path.stat().st_size == len(encoded) and path.read_bytes() == encoded:
            return
    except OSError:
        pass
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it; raises OSError, which names the file, when the disk is full."""
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names in a folder, which a power cut may otherwise lose."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def free_space(path: Path) -> int:
    """Bytes that are free on the disk where `path` is or will be."""
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
    """Write a JSON file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
