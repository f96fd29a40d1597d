"""A tracker of curves alone, beside MLflow: one for the whole run, and one for each stage or unit.

What such a service gets is metrics by step; provenance, files and models are MLflow's. A service that fails later is
one warning, because the numbers are in the run's folder.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from pipeline.errors import UserError
from pipeline.files.passwords import masked
from pipeline.tracking.description import flatten
from pipeline.tracking.tracker import NullTracker, RunFacts, never

log = logging.getLogger(__name__)
WHOLE = "run"  # label of the curves of the whole run; those of stages begin with a number


class Curves(abc.ABC):
    """The curves of a run or a stage, continued where an earlier call wrote some."""

    @abc.abstractmethod
    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers of a step; what an earlier call wrote of the same step is not there twice."""

    @abc.abstractmethod
    def close(self, finished: bool) -> None:
        """Write everything; `finished` is False where an error or a stop ended it."""


class CurveTracker(NullTracker, abc.ABC):
    """Sends metrics to one service; `Tracker` says what its methods do."""

    service: ClassVar[str]
    field: ClassVar[str]  # of the recipe, for messages

    def __init__(self, facts: RunFacts, run_path: Path) -> None:
        self.facts, self.run_path = facts, run_path
        self._open: list[Curves | None] = []  # innermost last
        self._warned = False

    @abc.abstractmethod
    def curves(self, label: str) -> Curves:
        """Open the curves of WHOLE or of a stage, by its label."""

    @property
    def settings(self) -> dict[str, str]:
        """The recipe as flat texts, without passwords."""
        return {name: masked(value) for name, value in flatten(self.facts.settings).items()}

    @contextmanager
    def sequence(self, state: Mapping[str, Any], stays_finished: Any = never) -> Iterator[None]:
        try:
            opened = self.curves(WHOLE)
        except Exception as error:  # whatever the service's package raises
            raise UserError(
                f"{self.service} cannot be used ({masked(first_line(error))}); mend that, or set {self.field} to false."
            ) from error
        with self._running(opened):
            yield

    @contextmanager
    def stage(self, index: int, name: str) -> Iterator[None]:
        opened = None
        with self._tolerant(f"opening the curves of {name}"):
            opened = self.curves(f"{index + 1:02d}-{name}")
        with self._running(opened):
            yield

    def metrics(self, values: Mapping[str, float | None], step: int) -> None:
        known = {name: float(value) for name, value in values.items() if value is not None}
        current = self._open[-1] if self._open else None
        if current is not None and known:
            with self._tolerant("writing metrics"):
                current.add(known, step)

    @contextmanager
    def _running(self, opened: Curves | None) -> Iterator[None]:
        self._open.append(opened)
        finished = False
        try:
            yield
            finished = True
        finally:
            self._open.pop()
            if opened is not None:
                with self._tolerant("closing the curves"):
                    opened.close(finished)

    @contextmanager
    def _tolerant(self, doing: str) -> Iterator[None]:
        """Turn failures of the service into one warning, because training must not end by them."""
        try:
            yield
        except Exception as error:
            if not self._warned:
                self._warned = True
                log.warning(
                    "%s failed while %s (%s); training goes on, and %s has all numbers. Further failures of it are not "
                    "reported.",
                    self.service,
                    doing,
                    masked(first_line(error)),
                    self.run_path,
                )


def first_line(error: Exception) -> str:
    """The first line of an error's message, else its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
