"""The runs that the page shows, by the names in its addresses; each is read anew for every request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.clip.benchmark.report import read_results
from pipeline.config.kinds import run_kind
from pipeline.errors import UserError
from pipeline.files.lock import FileLock
from pipeline.report.listing import benchmark_figures
from pipeline.runs.folder import RunFolder, read_run
from pipeline.runs.layout import CONFIG, LOCK, MATRIX, STATE
from pipeline.ui.web import PageError


@dataclass(frozen=True)
class Entry:
    """A run as it is now: a sequence's, a benchmark's, or one that cannot be read, with the reason in `fault`."""

    name: str
    path: Path
    run: RunFolder | None = None
    benchmark: Mapping[str, Any] | None = None  # the lines of results.json and the figures of `ls`
    fault: str = ""

    @property
    def status(self) -> str:
        """The status that run.json has."""
        if self.run is not None:
            return str(self.run.state.get("status", "new"))
        return "damaged" if self.benchmark is None else str(self.benchmark["status"])

    @property
    def writer(self) -> str:
        """The process that works on the run at the moment; "" for none."""
        lock = FileLock(self.path / LOCK)
        return lock.holder() if lock.is_held() else ""

    @property
    def progress(self) -> str:
        """How many of the run's stages or units are finished: `3 of 6 stages`."""
        if self.benchmark is not None:
            done, _, total = str(self.benchmark["stages"]).partition("/")
            return f"{done} of {total} units"
        if self.run is None:
            return ""
        return (
            f"{(-1 if self.run.last_stage is None else self.run.last_stage) + 1} of {len(self.run.tasks)} tasks scored"
        )


def names_of(paths: Sequence[Path]) -> dict[str, Path]:
    """The runs by the names of their folders, which get a number where several have the same.

    Raises UserError for a path that is no run, also where there are no paths; a damaged run is one.
    """
    if not paths:
        raise UserError("no run was named; expected the folder of at least one run, such as runs/nano-modalprompt-s0.")
    named: dict[str, Path] = {}
    for path in paths:
        if path.is_file() or not any((path / file).is_file() for file in (STATE, CONFIG, MATRIX)):
            inside = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG}"))
            if inside:
                raise UserError(f"'{path}' holds runs and is none itself; name them, here {' '.join(inside[:3])}.")
            read_run(path)  # raises, with the reason
        if any(path.samefile(known) for known in named.values()):
            continue
        base = name = path.resolve().name or "run"
        number = 1
        while name in named:
            number += 1
            name = f"{base}-{number}"
        named[name] = path
    return named


def look(name: str, path: Path) -> Entry:
    """The run as it is now; a damaged one has its fault in a sentence."""
    try:
        if run_kind(path) == "clip":
            return Entry(name, path, benchmark=_benchmark(path))
        return Entry(name, path, run=read_run(path))
    except (UserError, OSError) as error:
        return Entry(name, path, fault=str(error))


def _benchmark(path: Path) -> dict[str, Any]:
    """The figures of a benchmark's run, with `lines`, the rows of its results, and `note` where there are none."""
    found = {**benchmark_figures(path), "lines": [], "note": ""}
    try:
        return {**found, "lines": read_results(path)["lines"]}
    except UserError as error:
        return {**found, "note": str(error)}


def sequence_of(entry: Entry) -> RunFolder:
    """The run of a sequence; PageError with the reason for another one."""
    if entry.run is not None:
        return entry.run
    if entry.benchmark is not None:
        raise PageError(
            f"{entry.name} is a benchmark of prompt methods on CLIP; its scores are on its own page, and examples, "
            "chat and `add` are for task sequences.",
            422,
        )
    raise PageError(entry.fault, 422)
