"""Reads tasks in CoIN layout: `<root>/instructions/<Task>/{train,test}.json`, image paths relative to `<root>`.

A record that cannot be used (an answer or image missing, an id used twice, ...) comes out as a `BadRecord` in its
place; a file that cannot be used raises UserError. Spec: modalprompt.md section 6 (data formats).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.bad_records import BadRecord, Tolerance
from data_prep.parallel import ordered_map
from data_prep.sources.annotations import read_annotations
from data_prep.sources.coin_entries import Entry, UnusableError, read_entry, record_name
from data_prep.sources.coin_files import IMAGE_ROOTS, annotation_file, image_path, split_files
from data_prep.sources.image_files import UnreadableError, read_image, why_missing
from data_prep.sources.image_states import ImageState, image_states
from data_prep.sources.text_files import read_json
from pipeline.data.origin import Origin, file_state
from pipeline.data.sample import Sample
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.data import DataConfig, TaskConfig


@dataclass(frozen=True)
class CoinSplit:
    """One split of one task: its files and how to read them; `limit` cuts after so many records."""

    root: Path
    task: str
    split: str
    limit: int | None = None
    files: Sequence[str] = ()
    annotations: str | None = None
    number_repeated: bool = False

    def records(self, start: int = 0, workers: int = 1) -> Iterator[Sample | BadRecord]:
        """Yield every record from the `start`-th on, as a sample or as what is wrong with it.

        `workers` threads read the images and check that each can be decoded. Raises UserError for a missing or
        damaged file.
        """
        return ordered_map(self._sample, self._entries[start:], workers)

    def __len__(self) -> int:
        """How many records there are, usable or not."""
        return len(self._entries)

    def unusable(self) -> Iterator[BadRecord]:
        """Yield the bad records that show without decoding images: a fault in the JSON, an image file missing."""
        for entry in self._entries:
            if isinstance(entry, BadRecord):
                yield entry
            elif entry.image and self.images[entry.image] is None:
                record = self._sample(entry)
                if isinstance(record, BadRecord):
                    yield record

    def fingerprint(self) -> str:
        """Return a hash that changes when a JSON file, the limit, or size or time of change of an image changes."""
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
        for image in sorted(self.images):
            state = self.images[image]
            # A missing image is reported, with its record, when the records are read.
            found = None if state is None else (state.size, state.mtime_ns)
            digest.update(f"{image} {found}\n".encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def origin(self, settings: Mapping[str, Any]) -> Origin:
        """What dataset.json keeps of this source, read with these settings of the recipe."""
        return Origin(self.fingerprint(), settings, self._count, self.file_states())

    def file_states(self) -> dict[str, dict[str, Any]]:
        """Size, time of change and hash of the text files, by their paths relative to the root."""
        return {self._relative(path): file_state(path) for path in self.text_files}

    def with_limit(self, limit: int | None) -> CoinSplit:
        """The same split with another limit."""
        return dataclasses.replace(self, limit=limit)

    @cached_property
    def text_files(self) -> list[Path]:
        """The files that are read beside the images."""
        return [*self._paths, *([self._annotation_path] if self._annotation_path else [])]

    @property
    def text_names(self) -> list[str]:
        """Their paths relative to the root."""
        return [self._relative(path) for path in self.text_files]

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path, self.root)

    @cached_property
    def images(self) -> dict[str, ImageState | None]:
        """Every distinct image and where it is, None for one that is missing."""
        named = (entry.image for entry in self._entries if isinstance(entry, Entry) and entry.image)
        return image_states(named, [self.root / folder if folder else self.root for folder in IMAGE_ROOTS])

    @cached_property
    def _paths(self) -> list[Path]:
        return split_files(self.root, self.task, self.split, self.files)

    @cached_property
    def _annotation_path(self) -> Path | None:
        return annotation_file(self.root, self.task, self.annotations) if self.split == "test" else None

    @property
    def _entries(self) -> list[Entry | BadRecord]:
        return self._all_entries if self.limit is None else self._all_entries[: self.limit]

    @property
    def _count(self) -> int:
        return len(self._all_entries)

    @cached_property
    def _all_entries(self) -> list[Entry | BadRecord]:
        known = read_annotations(self._annotation_path) if self._annotation_path else None
        first: dict[str, str] = {}  # id -> the record that used it first
        times: dict[str, int] = {}
        entries: list[Entry | BadRecord] = []
        for path in self._paths:
            file = str(path)
            for number, raw in enumerate(_read(path)):
                try:
                    entry = read_entry(raw, file, number, known)
                except UnusableError as error:
                    entries.append(BadRecord(file, record_name(raw, number), str(error)))
                    continue
                times[entry.id] = count = times.get(entry.id, 0) + 1
                earlier = first.setdefault(entry.id, f"{file}, {entry.record}")
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
        known = self.__dict__.get("images", {}).get(image)  # asked for already: no more calls for this image
        path = image_path(self.root, image) if known is None else Path(known.path)
        if known is None and not os.path.isfile(path):  # False too for a name that no file can have
            missing = why_missing([self.root / folder for folder in IMAGE_ROOTS], image)
            if missing is not None:
                raise UnusableError(f"the image {image!r} {missing}")
            raise UnusableError(f"the image {path} does not exist. Put it there or set data.root to its root folder.")
        try:
            return read_image(path)
        except UnreadableError as error:
            raise UnusableError(f"the image {path} {error}") from error


def coin_split(data: DataConfig, task: TaskConfig, split: str) -> CoinSplit:
    """Return what a recipe says of one split of a task."""
    train = split == "train"
    limit, files = (task.limit_train, task.train_files) if train else (task.limit_test, task.test_files)
    number_repeated = data.repeated_ids == "number"
    return CoinSplit(Path(data.root), task.name, split, limit, files, task.annotations, number_repeated)


def read_task(
    root: str | os.PathLike[str], task: str, split: str, limit: int | None = None, start: int = 0, workers: int = 1
) -> Iterator[Sample]:
    """Yield the samples of one task and split, from the `start`-th record on, at most the first `limit` records.

    Raises UserError naming file and record for the first one that cannot be used.
    """
    tolerance = Tolerance(0)
    for record in CoinSplit(Path(root), task, split, limit).records(start, workers):
        if isinstance(record, BadRecord):
            tolerance.skip(record)
        else:
            yield record


def _read(path: Path) -> list[Any]:
    content = read_json(path, "an array of entries")
    if not isinstance(content, list) or not content:
        found = "an empty array" if content == [] else type(content).__name__
        raise UserError(f"{path} holds {found}; expected a JSON array with at least one entry. Restore the file.")
    return content


def _repeated(earlier: str) -> str:
    return (
        f"its id is that of {earlier}; expected every id once. Correct it, or set data.repeated_ids to number if "
        "ids are meant to repeat."
    )
