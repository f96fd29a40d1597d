"""A prepared dataset of a benchmark: shards of its training and test images, and the few-shot rows of each seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.clip.images.classes import Group, base_classes
from pipeline.data.shards import IndexedShards
from pipeline.data.stored_pictures import require_upright
from pipeline.errors import UserError
from pipeline.files.atomic import replacing

CLASSES_FILE = "classes.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ClassList:
    """classes.json: the class names, the label of every row of the shards, and the few-shot rows of each seed.

    `sampling` are the settings with which the rows were drawn; `fingerprints` identify the shards that the rows index.
    """

    names: list[str]
    train: list[int]  # label of each training row; empty for a dataset that is only evaluated
    test: list[int]  # label of each test row
    few_shot: dict[str, list[int]]  # seed -> rows of train
    sampling: dict[str, Any]
    fingerprints: dict[str, str]
    format: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write classes.json into a dataset's folder."""
        with replacing(folder / CLASSES_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self), ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> ClassList:
        """The content of a dataset's classes.json; UserError when it is missing, damaged or of another format."""
        path = folder / CLASSES_FILE
        if not path.is_file():
            raise UserError(f"There is no {path}; run `python -m pipeline prepare RECIPE` first.")
        try:
            found = cls(**json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); run `python -m pipeline prepare RECIPE` again.") from None
        if found.format != FORMAT_VERSION:
            raise UserError(
                f"{path} has format {found.format}, this version reads {FORMAT_VERSION}; run "
                "`python -m pipeline prepare RECIPE` again."
            )
        return found


@dataclass(frozen=True)
class ClassGroup:
    """Some of a dataset's classes: their names, and the rows and labels (counted from 0) of their images."""

    names: tuple[str, ...]
    rows: tuple[int, ...]
    labels: tuple[int, ...]


class PreparedDataset:
    """One prepared dataset; UserError when a part is missing or the shards are not those that classes.json indexes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.classes = ClassList.read(folder)
        self.test = self._shards("test")
        self.train = self._shards("train") if "train" in self.classes.fingerprints else None

    def _shards(self, split: str) -> IndexedShards:
        shards = IndexedShards(self.folder / split)
        if shards.fingerprint != self.classes.fingerprints.get(split):
            raise UserError(
                f"{self.folder / split} is not the data that {self.folder / CLASSES_FILE} counts in; run "
                "`python -m pipeline prepare RECIPE` again."
            )
        require_upright(shards)
        return shards

    def splits(self) -> list[tuple[str, IndexedShards]]:
        """The splits of the dataset: name and shards."""
        return [("test", self.test), *([("train", self.train)] if self.train is not None else [])]

    def identity(self, seed: int, group: Group) -> str:
        """A hash of the class names, image files and labels a seed trains on; other prepared seeds do not change it."""
        shots = self.few_shots(seed, group)
        assert self.train is not None
        images = [[self.train.ids[row], label] for row, label in zip(shots.rows, shots.labels, strict=True)]
        return hashlib.sha256(json.dumps([shots.names, images]).encode()).hexdigest()

    def few_shots(self, seed: int, group: Group) -> ClassGroup:
        """The few-shot training images of a seed in a group of classes; UserError for a seed that was not prepared."""
        if str(seed) not in self.classes.few_shot:
            raise UserError(
                f"{self.folder} was prepared for the seeds {', '.join(self.classes.few_shot) or '(none)'}, not for "
                f"{seed}. Run `python -m pipeline prepare RECIPE` with the seed."
            )
        return self._group(group, self.classes.train, self.classes.few_shot[str(seed)])

    def test_images(self, group: Group) -> ClassGroup:
        """The test images of a group of classes; UserError when a class has none."""
        found = self._group(group, self.classes.test, range(len(self.classes.test)))
        empty = sorted(set(range(len(found.names))) - set(found.labels))
        if empty:
            raise UserError(
                f"{self.folder} has no test image of class '{found.names[empty[0]]}' ({len(empty)} such classes). Add "
                "images, or remove the class, and run `python -m pipeline prepare RECIPE` again."
            )
        return found

    def _group(self, group: Group, labels: Sequence[int], rows: Sequence[int]) -> ClassGroup:
        count = len(self.classes.names)
        middle = base_classes(count)
        first, end = {"all": (0, count), "base": (0, middle), "new": (middle, count)}[group]
        kept = tuple(row for row in rows if first <= labels[row] < end)
        if first == end or not kept:
            raise UserError(
                f"{self.folder} has no images of its {group} classes ({count} classes in all). Prepare more classes, "
                "or set data.protocol to all_classes."
            )
        return ClassGroup(tuple(self.classes.names[first:end]), kept, tuple(labels[row] - first for row in kept))
