"""An error of one rank as the other ranks raise it."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

from pipeline.errors import PipelineError, RankFailed, for_user


@dataclass(frozen=True)
class RemoteError:
    """A rank's error in a form that can be pickled and sent to the other ranks."""

    error: PipelineError
    cause: str | None  # class and message of what the error was raised from

    @classmethod
    def of(cls, error: Exception, rank: int) -> RemoteError:
        """Describe an error of `rank`.

        An error of the project keeps its class, message and attributes. A library's error that `for_user` has a message
        for (a full disk, a missing package) becomes the project's error with this message and the same exit code.
        Anything else is a bug, whose traceback is shown by the rank that met it, and becomes RankFailed.
        """
        told = for_user(error)
        if told is None:
            told = RankFailed(f"Rank {rank} failed ({_named(error)}); its output has the traceback.")
        return cls(_picklable(told), None if error.__cause__ is None else _named(error.__cause__))

    def raised(self) -> PipelineError:
        """The error to raise on another rank; its `__cause__` is a RankFailed that names the original one."""
        self.error.__cause__ = None if self.cause is None else RankFailed(self.cause)
        return self.error


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _picklable(error: PipelineError) -> PipelineError:
    """The error itself where pickle can carry it, else one of its nearest class in `pipeline.errors`."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class inside a function, or an attribute that cannot be pickled
        bases = (base for base in type(error).__mro__ if issubclass(base, PipelineError))
        kind = next(base for base in bases if base.__module__ == PipelineError.__module__)
        plain = kind.__new__(kind)
        plain.args = (str(error),)
        return plain
    return error
