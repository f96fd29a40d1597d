"""What may be wrong around a finished run while a verb is tried: files taken away, damaged, or not to be written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Take a file or folder away while the block runs; what stands there then goes."""
    kept = path.with_name(path.name + ".kept")
    path.rename(kept)
    try:
        yield kept
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        kept.rename(path)


@contextlib.contextmanager
def flipped(path: Path) -> Iterator[None]:
    """One bit of the file's last byte is another while the block runs."""
    with replaced(path) as kept:
        content = bytearray(kept.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        yield


@contextlib.contextmanager
def full_disk_of(run: Path) -> Iterator[None]:
    """No file of the run's folder can be written while the block runs."""
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).is_relative_to(run):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.files.atomic.os.replace", full)
        yield
