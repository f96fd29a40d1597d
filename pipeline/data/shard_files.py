"""Random reads from a split's shards with a bounded number of open files.

All splits of a process share the bound, because the limit of open files is per process (`ulimit -n`, often 1024): with
every shard open, a thousand shards would reach it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_OPEN = 64  # most recently used shards that a process keeps open


@dataclass
class _Descriptor:
    number: int
    readers: int = 0  # threads that read from it; closed meanwhile, its number could be reused for another file


class _Descriptors:
    """The open shards of this process, in the order of their last use."""

    def __init__(self) -> None:
        # Reentrant: an allocation while it is held may run the garbage collector, and with it `ShardFiles.__del__`.
        self._lock = threading.RLock()
        self._open: OrderedDict[tuple[int, int], _Descriptor] = OrderedDict()
        # A child that is forked while another thread holds the lock would inherit a lock that nobody releases.
        os.register_at_fork(
            before=self._lock.acquire, after_in_parent=self._lock.release, after_in_child=self._in_forked_child
        )

    def _in_forked_child(self) -> None:
        """Keep using the inherited descriptors; `pread` does not move the file position, which processes share."""
        for descriptor in self._open.values():
            descriptor.readers = 0  # the reading threads exist only in the parent
        self._lock.release()

    @contextlib.contextmanager
    def opened(self, key: tuple[int, int], path: Path) -> Iterator[int]:
        """The descriptor of a shard, opened if needed and kept open while the block runs."""
        with self._lock:
            descriptor = self._open.get(key)
            if descriptor is None:
                descriptor = self._open[key] = _Descriptor(self._new(path))
            self._open.move_to_end(key)
            descriptor.readers += 1
            self._close_all_but(MOST_OPEN)
        try:
            yield descriptor.number
        finally:
            with self._lock:
                descriptor.readers -= 1

    def close(self, owner: int) -> None:
        """Close the shards of one owner."""
        with self._lock:
            for key in [key for key in list(self._open) if key[0] == owner]:
                os.close(self._open.pop(key).number)

    def _new(self, path: Path) -> int:
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._close_all_but(0)  # other files use up the limit; closed shards can be opened again
            return os.open(path, os.O_RDONLY)

    def _close_all_but(self, kept: int) -> None:
        for key in list(self._open):
            if len(self._open) <= kept:
                break
            descriptor = self._open.get(key)  # None: the garbage collector has closed it meanwhile
            if descriptor is not None and not descriptor.readers:
                del self._open[key]
                os.close(descriptor.number)


_DESCRIPTORS = _Descriptors()


class ShardFiles:
    """The shards of one split; safe to use from several threads, to fork and to pickle."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def read(self, shard: int, size: int, offset: int) -> bytes:
        """Read up to `size` bytes at `offset` of a shard, fewer at its end; raises OSError."""
        with _DESCRIPTORS.opened((id(self), shard), self.paths[shard]) as descriptor:
            return os.pread(descriptor, size, offset)

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[list[Path]]]:
        return ShardFiles, (self.paths,)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be ending
            _DESCRIPTORS.close(id(self))
