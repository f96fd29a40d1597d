"""How the C library keeps memory that was freed. Does nothing where it is not glibc."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
LARGE = 1 << 30  # bytes; weights of this size and more still go back to the system


def keep_freed_blocks() -> None:
    """Make the process keep the memory that it frees, up to its largest use, for what it allocates next.

    For computing on CPUs: by default blocks of 32 MB and more, and the end of the heap, go back to the system whenever
    they are freed, and each forward pass gets its activations as new pages, which the system fills with zeros one by
    one. In a virtual machine that was a third of the time of a convolutional vision tower.
    """
    _set((M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, 2 * LARGE - 1))


def return_freed_blocks() -> None:
    """Make the process return blocks of a megabyte and more to the system as soon as they are freed.

    For services: glibc raises its mmap threshold up to 32 MB once such a block was freed, and keeps one heap per
    thread. After large images in every reader thread the process would hold hundreds of unused megabytes.
    """
    _set((M_MMAP_THRESHOLD, 1 << 20), (M_TRIM_THRESHOLD, 4 << 20), (M_ARENA_MAX, 2))


def _set(*options: tuple[int, int]) -> None:
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for option, value in options:
            library.mallopt(option, value)
