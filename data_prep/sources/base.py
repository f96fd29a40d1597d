"""The base class of data formats. A format knows where a task's files are under a root and how to read their records.

What is the same for every format is here: repeated ids, missing or damaged images, limits, fingerprints, and what
`check` and `prepare` ask of a source.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from data_prep.bad_records import BadRecord
from data_prep.parallel import ordered_map
from data_prep.sources.image_files import UnreadableError, read_image, why_missing
from data_prep.sources.image_states import ImageState, image_states
from pipeline.config import registry
from pipeline.data.origin import Origin, file_state
from pipeline.data.sample import Sample
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from typing_extensions import Self

    from pipeline.config.data import DataConfig, TaskConfig


class UnusableError(PipelineError):
    """A record cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One checked record, whose image has not been read yet.

    Args:
        file: the file of the record, for messages.
        record: its place in the file, such as "line 3", for messages.
        id: names the sample in predictions; unique in a split.
        image: path of the image relative to the root or to one of `image_folders`; None for a question without one.
        question: without a tag for the image.
        answer: the true answer, not empty.
        meta: further fields for the metric, such as `answers` of several annotators; must be JSON values.
    """

    file: str
    record: str
    id: str
    image: str | None
    question: str
    answer: str
    meta: dict[str, Any]

    def bad(self, reason: object) -> BadRecord:
        """A BadRecord for this entry."""
        return BadRecord(self.file, self.record, str(reason))


@dataclass(frozen=True)
class SourceSplit:
    """One split of one task, as the fields of a recipe name it; a subclass is a data format.

    A format implements `task_folder`, `text_files` and `entries`. `limit` is the number of records that are used;
    `files` are the task's `train_files` or `test_files`, `annotations` its field of that name. A format that does not
    support them raises UserError where they are given.
    """

    root: Path
    task: str
    split: str
    limit: int | None = None
    files: Sequence[str] = ()
    annotations: str | None = None
    number_repeated: bool = False

    # Folders below the root at which the image paths of entries may start; the first one that has the file is used.
    image_folders: ClassVar[tuple[str, ...]] = ("",)
    # Whether `draw` generates the files from a seed, so that users do not change them.
    drawn: ClassVar[bool] = False
    # Increase it when a change of `entries` gives other samples for the same files; prepared splits are then stale.
    version: ClassVar[int] = 0

    @classmethod
    def task_folder(cls, root: Path, task: str) -> Path:
        """The folder of a task's text files, which may hold a task.json with its metric; it need not exist."""
        raise NotImplementedError

    @cached_property
    def text_files(self) -> list[Path]:
        """The files that are read beside the images, at least one; UserError where one is missing."""
        raise NotImplementedError

    def entries(self) -> Iterable[Entry | BadRecord]:
        """Every record of `text_files` in order, also unusable ones; without the limit.

        Raises UserError for a file that cannot be read.
        """
        raise NotImplementedError

    @classmethod
    def draw(cls, data: DataConfig) -> None:
        """Generate the files under the root, where the format is drawn; called before the splits are prepared."""

    @classmethod
    def require_drawn(cls, data: DataConfig) -> None:
        """Raise UserError where `draw` has not been called yet; processes that share the work must not call it."""

    @classmethod
    def missing(cls, data: DataConfig, tasks: Sequence[TaskConfig]) -> list[str]:
        """The messages of `check` about unprepared tasks whose folder does not exist."""
        absent = [task.name for task in tasks if not cls.task_folder(Path(data.root), task.name).is_dir()]
        folders = ", ".join(str(cls.task_folder(Path(data.root), name)) for name in absent)
        advice = f"the data format {data.source} expects them there. Put them there, or set data.root."
        return [f"data.root: there is no {folders}; {advice}"] if absent else []

    @classmethod
    def fetching(cls, data: DataConfig, task: str) -> str | None:
        """A sentence with the address of a task's images, shown where the task cannot be read; None: unknown."""
        return None

    def records(self, start: int = 0, workers: int = 1) -> Iterator[Sample | BadRecord]:
        """Yield every record from the `start`-th on, as a Sample or a BadRecord.

        `workers` threads read the images and check that each can be decoded. Raises UserError for a missing or
        damaged text file.
        """
        return ordered_map(self._sample, self._entries[start:], workers)

    def __len__(self) -> int:
        """Number of records, usable or not."""
        return len(self._entries)

    def unusable(self) -> Iterator[BadRecord]:
        """Yield the bad records that are found without decoding images: faults in the text and missing image files."""
        for entry in self._entries:
            if isinstance(entry, BadRecord):
                yield entry
            elif entry.image and self.images[entry.image] is None:
                record = self._sample(entry)
                if isinstance(record, BadRecord):
                    yield record

    def fingerprint(self) -> str:
        """Return a hash that changes with a text file, the limit, or an image's size or modification time."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        first, *more = self.text_files
        digest = hashlib.sha256(first.read_bytes())
        for path in more:
            digest.update(f"\n{path.name} ".encode() + path.read_bytes())
        digest.update(f"\nlimit {self.limit}\n".encode())
        if self.number_repeated:
            digest.update(b"repeated ids numbered\n")
        if self.version:
            digest.update(f"version {self.version} of the format\n".encode())
        for image in sorted(self.images):
            state = self.images[image]
            # A missing image is reported, with its record, when the records are read.
            found = None if state is None else (state.size, state.mtime_ns)
            digest.update(f"{image} {found}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def origin(self, settings: Mapping[str, Any]) -> Origin:
        """The entries about this source in dataset.json, read with these settings of the recipe."""
        return Origin(self.fingerprint(), settings, len(self._all_entries), self.file_states())

    def file_states(self) -> dict[str, dict[str, Any]]:
        """Size, modification time and hash of the text files, by their paths relative to the root."""
        return {self._relative(path): file_state(path) for path in self.text_files}

    def with_limit(self, limit: int | None) -> Self:
        """The same split with another limit."""
        return dataclasses.replace(self, limit=limit)

    @property
    def text_names(self) -> list[str]:
        """The text files' paths relative to the root."""
        return [self._relative(path) for path in self.text_files]

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path, self.root)

    @cached_property
    def images(self) -> dict[str, ImageState | None]:
        """The state of every distinct image by its path in the records; None for a missing one."""
        named = (entry.image for entry in self._entries if isinstance(entry, Entry) and entry.image)
        return image_states(named, self.image_roots(self.root))

    @classmethod
    def image_roots(cls, root: Path) -> list[Path]:
        """The folders at which image paths may start."""
        return [root / folder if folder else root for folder in cls.image_folders]

    @property
    def _entries(self) -> list[Entry | BadRecord]:
        return self._all_entries if self.limit is None else self._all_entries[: self.limit]

    @cached_property
    def _all_entries(self) -> list[Entry | BadRecord]:
        first: dict[str, str] = {}  # id -> the record that used it first
        times: dict[str, int] = {}
        entries: list[Entry | BadRecord] = []
        for entry in self.entries():
            if isinstance(entry, BadRecord):
                entries.append(entry)
                continue
            times[entry.id] = count = times.get(entry.id, 0) + 1
            earlier = first.setdefault(entry.id, f"{entry.file}, {entry.record}")
            if count == 1:
                entries.append(entry)
            elif self.number_repeated:
                entries.append(dataclasses.replace(entry, id=f"{entry.id}#{count}"))
            else:
                entries.append(entry.bad(_repeated(earlier)))
        return entries

    def _sample(self, entry: Entry | BadRecord) -> Sample | BadRecord:
        if isinstance(entry, BadRecord):
            return entry
        try:
            image = None if entry.image is None else self._image(entry.image)
        except UnusableError as error:
            return entry.bad(error)
        return Sample(id=entry.id, image=image, question=entry.question, answer=entry.answer, meta=entry.meta)

    def _image(self, image: str) -> bytes:
        known = self.__dict__.get("images", {}).get(image)  # cached by `images`: saves file system calls
        roots = self.image_roots(self.root)
        candidates = [root / image for root in roots] if known is None else [Path(known.path)]
        path = next((path for path in candidates if os.path.isfile(path)), candidates[0])
        if known is None and not os.path.isfile(path):  # also for a name that no file can have
            missing = why_missing(roots, image)
            if missing is not None:
                raise UnusableError(f"the image {image!r} {missing}")
            raise UnusableError(f"the image {path} does not exist. Put it there or set data.root to its root folder.")
        try:
            return read_image(path)
        except UnreadableError as error:
            raise UnusableError(f"the image {path} {error}") from error


def source_class(data: DataConfig) -> type[SourceSplit]:
    """The data format that a recipe names."""
    found: type[SourceSplit] = registry.load("sources", data.source)
    return found


def source_split(data: DataConfig, task: TaskConfig, split: str) -> SourceSplit:
    """Return the source of one split of a recipe's task."""
    train = split == "train"
    limit, files = (task.limit_train, task.train_files) if train else (task.limit_test, task.test_files)
    number_repeated = data.repeated_ids == "number"
    return source_class(data)(Path(data.root), task.name, split, limit, files, task.annotations, number_repeated)


def _repeated(earlier: str) -> str:
    return (
        f"its id is that of {earlier}; expected every id once. Correct it, or set data.repeated_ids to number if "
        "ids are meant to repeat."
    )
