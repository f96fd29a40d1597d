"""The limit on the files that a process may have open."""

from __future__ import annotations

import contextlib
import resource

WANTED_DESCRIPTORS = 16384  # soft limit to ask for; rank 0's TCP store holds three descriptors per rank


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files to WANTED_DESCRIPTORS, or to the hard limit where that is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(WANTED_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
