"""What can go wrong for a user, and the exit codes that tell a caller which kind it was."""

from __future__ import annotations

import difflib
import errno
import importlib.util
from collections.abc import Iterable
from typing import Any

EXIT_OK = 0
EXIT_FAILURE = 1  # anything that is not the user's input: a bug, a full disk, a lost rank
EXIT_USER = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on


# A disk that is full or read-only, a file of somebody else's: no bug, so the user gets a sentence and no traceback.
FORBIDDEN = (errno.EACCES, errno.EPERM)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, *FORBIDDEN)


# Packages (by the name they are imported by) that only the extras of pyproject.toml install.
EXTRAS = {
    "train": ("deepspeed", "pyarrow", "webdataset"),
    "track": ("mlflow",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "report": ("matplotlib",),
    "tables": ("openpyxl",),  # and pyarrow, which `train` has too
    "serve": ("httpx2", "starlette", "uvicorn"),
    "captions": ("pycocoevalcap",),
    "demo": ("sklearn",),
    "small": ("gguf",),
    "quantised": ("bitsandbytes",),
}


class PipelineError(Exception):
    """Whatever the project raises on purpose; the message is a sentence for people, and needs no traceback.

    A command that it ends has `exit_code`. It is pickled with its class, message and attributes, whatever arguments a
    subclass's constructor takes, so that ranks can raise what one of them met.
    """

    exit_code = EXIT_FAILURE

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.args), self.__dict__ or None


def _restored(kind: type[PipelineError], args: tuple[Any, ...]) -> PipelineError:
    error = kind.__new__(kind)
    error.args = args
    return error


class UserError(PipelineError):
    """The user's input is wrong; the message is one sentence: what was found, what was expected, what to do."""

    exit_code = EXIT_USER


class UserErrors(UserError):
    """Several things are wrong: one sentence for each in `sentences`."""

    def __init__(self, sentences: Iterable[str]) -> None:
        self.sentences = list(sentences)
        super().__init__(" ".join(self.sentences))


class MissingExtra(UserError):
    """A package is not installed that belongs to one of the project's extras."""

    def __init__(self, package: str, extra: str) -> None:
        self.extra = extra
        super().__init__(f'{package} is not installed; run `pip install "continual-prompts[{extra}]"`.')


class OutOfMemory(PipelineError):
    """A GPU's memory was not enough; the message says which fields of the recipe help."""


class Unwritable(PipelineError):
    """A file could not be written or read for no fault of the project's; the message is that of `unwritable`."""


class RankFailed(PipelineError):
    """Another rank met an error that is a bug; that rank's output has the traceback."""


class Interrupted(PipelineError):
    """The run stopped early with its state saved; the same command resumes it."""

    exit_code = EXIT_RESUMABLE


def missing_extra(error: ImportError) -> MissingExtra | None:
    """The error for users when a failed import is that of a package of an extra, else None."""
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    if extra is None or importlib.util.find_spec(package) is not None:
        return None  # it is installed, and fails in another way
    return MissingExtra(package, extra)


def for_user(error: BaseException) -> PipelineError | None:
    """What an error means to a user, None for one that is a bug: ours as it is, a full disk, a package of an extra."""
    if isinstance(error, PipelineError):
        return error
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        return Unwritable(unwritable(error))
    return missing_extra(error) if isinstance(error, ImportError) else None


def require_extras(*extras: str) -> None:
    """Raise MissingExtra for the first package of these extras that is not installed; imports none of them."""
    for extra in extras:
        for package in EXTRAS[extra]:
            if importlib.util.find_spec(package) is None:
                raise MissingExtra(package, extra)


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
