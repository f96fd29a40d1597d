"""Fetches what tasks of a benchmark need, and says what a person has to fetch.

Everything is fetched that can be: one file that is refused does not keep back the others, and all refusals are said at
the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.download.fetch import PATIENCE, Fetched, Patience, Wanted, fetch, size_of
from data_prep.download.hub import HUB, instruction_files
from data_prep.download.manifest import Benchmark, File
from data_prep.download.record import RECORD, Entry, Record
from data_prep.download.unpack import unpack, unpacked_size
from pipeline.errors import UserError, UserErrors
from pipeline.files.atomic import free_space, sha256

ARCHIVES = "archives"  # folder of the root
RESERVE = 1 << 30  # bytes that are to stay free
UNPACKED = 2  # an archive of images takes about its size once more when it is unpacked


@dataclass(frozen=True)
class Job:
    """A file to fetch, and where its content goes if it is an archive."""

    wanted: Wanted
    unpack: Path | None = None


@dataclass(frozen=True)
class Downloads:
    """What is fetched into which root, from which Hub.

    `say` prints a line; `tell` gets address, bytes that are there, and bytes of the whole, where known.
    """

    benchmark: Benchmark
    tasks: list[str]
    root: Path
    endpoint: str = HUB
    patience: Patience = PATIENCE
    say: Callable[[str], None] = print
    tell: Callable[[str, int, int | None], None] = lambda url, there, whole: None

    def by_hand(self) -> list[str]:
        """A sentence for each task whose images a person has to fetch."""
        hands = [(task, self.benchmark.tasks[task].hand) for task in self.tasks]
        return [
            f"{task}: fetch its images by hand from {hand.url} into {self.root / hand.into}, because {hand.why}."
            for task, hand in hands
            if hand is not None
        ]

    def files(self) -> list[str]:
        """A line about each file at a fixed address: licence, size and hash, as far as they are known."""
        return [_described(file) for file in self.benchmark.files_of(self.tasks)]

    def run(self) -> dict[str, Any]:
        """Fetch, verify and unpack what is missing.

        Raises UserErrors with a sentence for each file that was refused, after the others have been fetched; UserError
        where the disk is too small, before anything is fetched; Interrupted where a server cannot be reached.
        """
        if not self.endpoint.startswith(("https://", "http://")):
            raise UserError(f"--endpoint is '{self.endpoint}'; expected an address such as {HUB}.")
        record = Record.of(self.root)
        jobs = [self._job(file, record) for file in self.benchmark.files_of(self.tasks)]
        listed = instruction_files(self.benchmark.instructions, self.tasks, self.root, self.endpoint, self.patience)
        jobs += [Job(wanted) for wanted in listed]
        missing = [job for job in jobs if not self._is_done(job, record)]
        refused: list[str] = []
        self._require_space(missing, refused)
        count = 0
        for job in missing:
            if any(sentence.startswith(f"{job.wanted.url} ") for sentence in refused):
                continue
            try:
                self._fetch(job, record)
                count += 1
            except UserError as error:
                refused.append(str(error))
        if refused:
            raise UserErrors(refused)
        return {
            "root": str(self.root),
            "tasks": self.tasks,
            "fetched": count,
            "there": len(jobs) - len(missing),
            "by_hand": self.by_hand(),
        }

    def _job(self, file: File, record: Record) -> Job:
        target = self.root / (ARCHIVES if file.unpack is not None else file.folder) / file.name
        if file.unpack is not None:  # train.zip of one owner is not that of another
            target = target.with_name(f"{Path(file.folder).name}-{file.name}")
        known, where = file.sha256, "as the project's list of sources says"
        size = file.size
        before = record.entries.get(file.url)
        if known is None and before is not None:
            known, size, where = before.sha256, before.size, f"as {record.path} recorded of the first download"
        return Job(Wanted(file.url, target, size, known, where), self.root / file.unpack if file.unpack else None)

    def _is_done(self, job: Job, record: Record) -> bool:
        """Whether a file is there as it was recorded; an archive that was unpacked may have been removed since."""
        entry = record.entries.get(job.wanted.url)
        if entry is None:
            return False
        if job.unpack is not None:
            return entry.unpacked is not None
        target = job.wanted.target
        same = job.wanted.sha256 in (None, entry.sha256)
        return same and target.is_file() and target.stat().st_size == entry.size

    def _require_space(self, missing: list[Job], refused: list[str]) -> None:
        """Raise UserError where the disk has no room for what is missing; files that are refused are not counted."""
        needed, unknown = 0, []
        for job in missing:
            try:
                size = job.wanted.size if job.wanted.size is not None else size_of(job.wanted.url, self.patience)
            except UserError as error:
                refused.append(str(error))
                continue
            if size is None:
                unknown.append(job.wanted.url)
                continue
            part = job.wanted.target.with_name(f"{job.wanted.target.name}.part")
            there = max((path.stat().st_size for path in (part, job.wanted.target) if path.is_file()), default=0)
            needed += max(0, size - there) + (0 if job.unpack is None else (UNPACKED - 1) * size)
        free = free_space(self.root)
        if needed and needed + RESERVE > free:
            raise UserError(
                f"The files take {_gb(needed)} below {self.root} with what is unpacked, and {_gb(free)} are free; "
                f"expected {_gb(RESERVE)} more than they take. Make room, set --root to another disk, or name fewer "
                "--tasks."
            )
        for url in unknown:
            self.say(f"{url}: its server does not tell its size; whether it fits is not known.")

    def _fetch(self, job: Job, record: Record) -> None:
        wanted = job.wanted
        if not wanted.target.is_file():
            found = fetch(wanted, lambda there, whole: self.tell(wanted.url, there, whole), self.patience)
        else:  # fetched before the process ended, or put here by hand
            found = _verified_copy(wanted)
        if wanted.sha256 is None:
            self.say(
                f"{wanted.url}: no hash of it is published; it has sha256 {found.sha256}, which {RECORD} keeps, and "
                "with which later downloads are compared."
            )
        entry = Entry(path=wanted.target.relative_to(self.root).as_posix(), **dataclasses.asdict(found))
        record.add(wanted.url, entry)
        if job.unpack is None:
            return
        size, free = unpacked_size(wanted.target), free_space(self.root)
        if size + RESERVE > free:
            raise UserError(f"{wanted.target} unpacks to {_gb(size)} and {_gb(free)} are free; make room and repeat.")
        count = unpack(wanted.target, job.unpack)
        record.add(wanted.url, entry.model_copy(update={"unpacked": count}))
        self.say(f"{wanted.target}: {count} files in {job.unpack}; the archive is not needed any more.")


def _verified_copy(wanted: Wanted) -> Fetched:
    """A file that is there under its own name, compared as a fetched one is, but never removed."""
    found = Fetched(wanted.target.stat().st_size, sha256(wanted.target))
    if wanted.sha256 not in (None, found.sha256):
        raise UserError(
            f"{wanted.url} is there as {wanted.target} with the sha256 {found.sha256}, expected {wanted.sha256} "
            f"({wanted.known_from}). Remove that file to fetch it anew."
        )
    return found


def _described(file: File) -> str:
    size = "size unknown" if file.size is None else _gb(file.size)
    known = "no hash published" if file.sha256 is None else f"sha256 {file.sha256}"
    licence = f"licence: see {file.terms}" if file.licence is None else file.licence
    return f"{file.url} into {file.folder}: {size}, {known}, {licence}"


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
