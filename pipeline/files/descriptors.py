"""The limit of files that a process may have open."""

from __future__ import annotations

import contextlib
import resource

WANTED_DESCRIPTORS = 16384  # soft limit to ask for, where the system allows it: rank 0's store has three per rank


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open files as far as is sensible and allowed; without permission it stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(WANTED_DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
