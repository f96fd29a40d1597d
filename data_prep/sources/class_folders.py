"""The user's own labelled images, as one folder per class or a CSV file, and labelled images as a source of samples.

Folders: `<root>/{train,val,test}/<class name>/<image>`. CSV: columns `path`, `class`, `split`. Classes are numbered in
the order of their names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.bad_records import BadRecord
from data_prep.parallel import ordered_map
from data_prep.sources.image_files import IMAGE_SUFFIXES, UnreadableError, read_image, why_missing
from data_prep.sources.image_states import image_states
from data_prep.sources.text_files import Columns, Fault, csv_rows
from pipeline.clip.images.classes import LabelledImage, Splits, refuse_twice
from pipeline.data.origin import Origin
from pipeline.data.sample import Sample
from pipeline.errors import UserError, nearest

COLUMNS = ("path", "class", "split")
SPLITS = ("train", "val", "test")


def read_class_folders(
    root: Path,
    names: Mapping[str, str] | None = None,
    train: str = "train",
    val: str | None = "val",
    test: str = "test",
) -> Splits:
    """The splits of `<root>/<split>/<class>/<image>`; the validation split may be missing.

    Raises UserError for a missing split, and for a class that the training or the test split lacks.

    Args:
        root: folder of the splits.
        names: class names by folder, in the order of labels; None: the folders' names, sorted.
        train: folder of the training split.
        val: folder of the validation split; None: there is none.
        test: folder of the test split.
    """
    if names is None:
        folders = {folder for split in (train, val, test) if split for folder in _folders(root / split)}
        names = {folder: folder for folder in sorted(folders)}
    parts = [tuple(labelled_folders(root, split, names)) if split else () for split in (train, val, test)]
    for split, part in ((train, parts[0]), (test, parts[2])):
        need_every_class(part, names, f"{root / split}")
    return Splits(*parts)


def labelled_folders(
    root: Path, split: str, names: Mapping[str, str], present_only: bool = False
) -> Iterator[LabelledImage]:
    """The images of `<root>/<split>/<class>/`, sorted, with paths relative to `root`.

    Labels number the classes of `names`, with `present_only` only those that have a folder in this split. Raises
    UserError for a folder that `names` lacks and for one without images.
    """
    present = _folders(root / split)
    unknown = sorted(set(present) - set(names))
    if unknown:
        raise UserError(
            f"{root / split / unknown[0]} is a folder of no known class ({len(unknown)} such folders). Remove it, or "
            "name the class."
        )
    counted = [folder for folder in names if folder in present or not present_only]
    for label, folder in enumerate(counted):
        if folder not in present:
            continue
        files = sorted(f.name for f in (root / split / folder).iterdir() if is_image(f.name))
        if not files:
            raise UserError(f"{root / split / folder} holds no images. Add some, or remove the empty class.")
        for file in files:
            yield LabelledImage((Path(split) / folder / file).as_posix(), label, names[folder])


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    # macOS writes a metadata file `._a.jpg` beside `a.jpg` on file systems of other systems.
    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def need_every_class(images: Sequence[LabelledImage], names: Mapping[str, str], where: str) -> None:
    """Raise UserError for a class of `names` that has no image."""
    lacking = sorted(set(names.values()) - {image.name for image in images})
    if not images:
        raise UserError(f"{where} holds no class folders with images; expected one folder per class. Put them there.")
    if lacking:
        raise UserError(f"{where} has no images of class '{lacking[0]}' ({len(lacking)} such classes). Add some.")


def read_csv(path: Path) -> Splits:
    """The splits of a CSV file with the columns path, class, split; paths are relative to the file's folder.

    Raises UserError that names the line for a missing value or an unknown split, and for an image twice in a split.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; expected a CSV file with the columns {', '.join(COLUMNS)}.")
    rows = []
    for line, row in csv_rows(path, Columns(COLUMNS)):
        if isinstance(row, Fault):
            raise UserError(row.sentence)
        rows.append((line, [row[column].strip() for column in COLUMNS]))
    labels = {name: label for label, name in enumerate(sorted({values[1] for _, values in rows}))}
    parts: dict[str, list[LabelledImage]] = {split: [] for split in SPLITS}
    for line, (image, name, split) in rows:
        if not image or not name:
            raise UserError(f"{path}, line {line} has no {'path' if not image else 'class'}. Fill it in.")
        if split not in parts:
            known = ", ".join(SPLITS)
            raise UserError(f"{path}, line {line} has the split '{split}'; expected {known}.{nearest(split, SPLITS)}")
        parts[split].append(LabelledImage(image, labels[name], name))
    for split in ("train", "test"):
        need_every_class(parts[split], {name: name for name in labels}, f"{path}, split {split},")
    splits = Splits(*(tuple(parts[split]) for split in SPLITS))
    refuse_twice(splits, str(path))
    return splits


@dataclass(frozen=True)
class ImageSplit:
    """Labelled images under a folder as samples for shards; the answer is the class name, `meta` has the label."""

    images: tuple[LabelledImage, ...]
    folder: Path

    def records(self, start: int = 0, workers: int = 1) -> Iterator[Sample | BadRecord]:
        """Yield every image from the `start`-th on, as a Sample or a BadRecord."""
        return ordered_map(self._sample, self.images[start:], workers)

    def fingerprint(self) -> str:
        """Return a hash that changes with the list of images, and with an image's size or modification time."""
        digest = hashlib.sha256()
        states = image_states((image.path for image in self.images), [self.folder])
        for image in self.images:
            state = states[image.path]
            found = (state.size, state.mtime_ns) if state else None
            digest.update(json.dumps([image.path, image.label, image.name, found]).encode() + b"\n")
        return digest.hexdigest()

    def origin(self, settings: Mapping[str, Any]) -> Origin:
        """The entries about this source in dataset.json, read with these settings of the recipe."""
        return Origin(self.fingerprint(), settings, len(self.images))

    def with_limit(self, limit: int | None) -> ImageSplit:
        """The split itself, as a benchmark's splits have no limit."""
        return self

    def _sample(self, image: LabelledImage) -> Sample | BadRecord:
        path = self.folder / image.path
        record = f"class '{image.name}'"
        if not os.path.isfile(path):  # also for a name that no file can have
            missing = why_missing([self.folder], image.path) or "does not exist. Put it there, or correct the folder."
            return BadRecord(str(path), record, f"the image {missing}")
        try:
            encoded = read_image(path)
        except UnreadableError as error:
            return BadRecord(str(path), record, f"the image {error}")
        return Sample(id=image.path, image=encoded, question="", answer=image.name, meta={"label": image.label})
