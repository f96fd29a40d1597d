"""What can go wrong for a user, and the exit codes that tell a caller which kind it was."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILURE = 1  # anything that is not the user's input: a bug, a full disk, a lost rank
EXIT_USER = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on


# A disk that is full or read-only, a file of somebody else's: no bug, so the user gets a sentence and no traceback.
FORBIDDEN = (errno.EACCES, errno.EPERM)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, *FORBIDDEN)


class UserError(Exception):
    """The user's input is wrong; the message is one sentence: what was found, what was expected, what to do."""


class UserErrors(UserError):
    """Several things are wrong: one sentence for each in `sentences`."""

    def __init__(self, sentences: Iterable[str]) -> None:
        self.sentences = list(sentences)
        super().__init__(" ".join(self.sentences))


class OutOfMemory(Exception):
    """A GPU's memory was not enough; the message says which fields of the recipe help."""


class Interrupted(Exception):
    """The run stopped early with its state saved; the same command resumes it."""


def unwritable(error: OSError) -> str:
    """The sentence for a disk that is full or read-only, and for a file that this user may not read or write."""
    place = f" '{error.filename}'" if error.filename else ""
    done = "may not be read or written by this user" if error.errno in FORBIDDEN else "could not be written"
    return (
        f"A file{place} {done} ({error.strerror}). What was finished is kept; once this is mended the "
        "same command goes on from there."
    )


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the valid name closest to `name`, or an empty string when none is close."""
    spelled = {candidate.lower(): candidate for candidate in valid}
    close = difflib.get_close_matches(name.lower(), spelled, n=1) or [
        candidate for candidate in spelled if len(name) > 1 and candidate.startswith(name.lower())
    ]
    return f" Did you mean '{spelled[close[0]]}'?" if close else ""
