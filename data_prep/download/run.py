"""Fetches what tasks of a benchmark need, and says what a person has to fetch.

Everything is fetched that can be: one file that is refused does not keep back the others, and all refusals are said at
the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.download.fetch import PATIENCE, Fetched, Patience, Wanted, fetch, size_of
from data_prep.download.hub import HUB, instruction_files
from data_prep.download.manifest import Benchmark, File
from data_prep.download.record import RECORD, Entry, Record
from data_prep.download.unpack import unpack, unpacked_size
from pipeline.errors import Interrupted, UserError, UserErrors
from pipeline.files.atomic import free_space, sha256

ARCHIVES = "archives"  # folder of the root
RESERVE = 1 << 30  # bytes that are to stay free
UNPACKED = 2  # an archive of images takes about its size once more when it is unpacked
ASKING = Patience(timeout_s=10.0, tries=1)  # for sizes, where nothing is fetched


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

    def listed(self) -> list[str]:
        """What `run` would fetch, in lines: each file at a fixed address with its licence, the sizes that servers tell,
        and the space on the disk. A server that cannot be reached is not waited for, and its sizes are unknown."""
        record, source = Record.of(self.root), self.benchmark.instructions
        repository = f"{self.endpoint}/datasets/{source.repository}: the instructions of {', '.join(self.tasks)}"
        lines: list[str] = []
        try:
            found = instruction_files(source, self.tasks, self.root, self.endpoint, ASKING)
            jobs = [Job(wanted) for wanted in found]
            lines.append(f"{repository}: {counted(len(found))}, {in_words(sum(file.size or 0 for file in found))}")
            reached = True
        except (UserError, Interrupted) as error:
            jobs, reached = [], not isinstance(error, Interrupted)
            lines.append(f"{repository}: size unknown ({error})")
        for file in self.benchmark.files_of(self.tasks):
            job = self._job(file, record)
            try:
                size = _size(job, ASKING) if reached or job.wanted.size is not None else None
                note = ""
            except (UserError, Interrupted) as error:
                size, note = None, f" ({error})"
            jobs.append(dataclasses.replace(job, wanted=dataclasses.replace(job.wanted, size=size)))
            lines.append(_described(file, size) + note)
        missing = [job for job in jobs if not self._is_done(job, record)]
        return [*lines, *self.by_hand(), _space(self.root, missing, {job: job.wanted.size for job in missing})]

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
        sizes: dict[Job, int | None] = {}
        for job in missing:
            try:
                sizes[job] = _size(job, self.patience)
            except UserError as error:
                refused.append(str(error))
        if not sizes:
            return
        needed, free = _needed(sizes), free_space(self.root)
        if needed and needed + RESERVE > free:
            raise UserError(
                f"The files take {in_words(needed)} below {self.root} with what is unpacked, and {in_words(free)} are "
                f"free; expected {in_words(RESERVE)} more than they take. Make room, set --root to another disk, or "
                "name fewer --tasks."
            )
        for job, size in sizes.items():
            if size is None:
                self.say(f"{job.wanted.url}: its server does not tell its size; whether it fits is not known.")
            elif job.unpack is not None:
                self.say(f"{job.wanted.url}: {in_words(size)}")
        self.say(_space(self.root, list(sizes), sizes))

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
            raise UserError(
                f"{wanted.target} unpacks to {in_words(size)} and {in_words(free)} are free; make room and repeat."
            )
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


def _size(job: Job, patience: Patience) -> int | None:
    """The size of a file as it is known, else as its server tells it; None where that tells none."""
    return job.wanted.size if job.wanted.size is not None else size_of(job.wanted.url, patience)


def _needed(sizes: Mapping[Job, int | None]) -> int:
    """Bytes that files of known sizes still take on the disk, with what archives unpack to."""
    return sum(
        _left(job, size) + (0 if job.unpack is None else (UNPACKED - 1) * size)
        for job, size in sizes.items()
        if size is not None
    )


def _left(job: Job, size: int) -> int:
    """Bytes of a file that are not there yet."""
    target = job.wanted.target
    parts = (target.with_name(f"{target.name}.part"), target)
    return max(0, size - max((path.stat().st_size for path in parts if path.is_file()), default=0))


def _space(root: Path, missing: list[Job], sizes: Mapping[Job, int | None]) -> str:
    """How much is to be fetched, what it takes, and how much is free, in a sentence."""
    unknown = [job for job in missing if sizes[job] is None]
    free = f"{in_words(free_space(root))} are free."
    if missing and len(unknown) == len(missing):
        return f"To fetch: {counted(len(missing))} of unknown size below {root}; {free}"
    fetched = sum(_left(job, size) for job in missing if (size := sizes[job]) is not None)
    beside = f", beside {counted(len(unknown))} of unknown size" if unknown else ""
    return (
        f"To fetch: {counted(len(missing))}, {in_words(fetched)}{beside}; they take about {in_words(_needed(sizes))} "
        f"below {root} with what is unpacked, and {free}"
    )


def _described(file: File, size: int | None) -> str:
    told = "size unknown" if size is None else in_words(size)
    known = "no hash published" if file.sha256 is None else f"sha256 {file.sha256}"
    licence = f"licence: see {file.terms}" if file.licence is None else file.licence
    return f"{file.url} into {file.folder}: {told}, {known}, {licence}"


def in_words(count: int) -> str:
    """Bytes in the largest decimal unit of which there is at least one: 7.1 GB, 640.0 MB, 0.3 kB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count / 1e3:.1f} kB"


def counted(number: int) -> str:
    """A number of files in words."""
    return f"{number} file{'s' * (number != 1)}"
