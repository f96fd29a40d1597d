"""A prepared dataset of a benchmark: shards of its training and test images, and the few-shot rows of each seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.clip.images.classes import UNLABELLED, Group, base_classes
from pipeline.data.shards import IndexedShards
from pipeline.data.stored_pictures import require_upright
from pipeline.errors import UserError
from pipeline.files.atomic import replacing

CLASSES_FILE = "classes.json"
FORMAT_VERSION = 2
WITHOUT_VALIDATION = 1  # the format before validation images, which is read too


@dataclass(frozen=True)
class ClassList:
    """classes.json: the class names, the label of every row of the shards, and the few-shot rows of each seed.

    Validation images are prepared for recipes with a search alone; then `validation` has every seed, with no rows where
    the dataset has no such images.

    `sampling` are the settings with which the rows were drawn; `fingerprints` identify the shards that the rows index.
    """

    names: list[str]
    train: list[int]  # label of each training row, UNLABELLED where nobody said it; empty for one only evaluated
    test: list[int]  # label of each test row; empty for unlabelled images without a test split
    few_shot: dict[str, list[int]]  # seed -> rows of train
    sampling: dict[str, Any]
    fingerprints: dict[str, str]
    format: int = FORMAT_VERSION
    val: list[int] = field(default_factory=list)  # label of each validation row
    validation: dict[str, list[int]] = field(default_factory=dict)  # seed -> rows of val

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
        if found.format not in (WITHOUT_VALIDATION, FORMAT_VERSION):
            raise UserError(
                f"{path} has format {found.format}, this version reads {WITHOUT_VALIDATION} and {FORMAT_VERSION}; run "
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
        self.test = self._shards("test") if "test" in self.classes.fingerprints or self.labelled else None
        self.train = self._shards("train") if "train" in self.classes.fingerprints else None
        self.val = self._shards("val") if "val" in self.classes.fingerprints else None

    @property
    def labelled(self) -> bool:
        """Whether its training images have labels."""
        return UNLABELLED not in self.classes.train

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
        found = {"test": self.test, "train": self.train, "val": self.val}
        return [(name, shards) for name, shards in found.items() if shards is not None]

    def identity(self, seed: int, group: Group) -> str:
        """A hash of the class names, image files and labels a seed trains on; other prepared seeds do not change it."""
        return self.identity_of(self.few_shots(seed, group))

    def pool_identity(self) -> str:
        """A hash of the class names and the training image files, without their labels."""
        assert self.train is not None
        return hashlib.sha256(json.dumps([self.classes.names, list(self.train.ids)]).encode()).hexdigest()

    def identity_of(self, shots: ClassGroup) -> str:
        """A hash of class names, and of the files and labels of training images."""
        assert self.train is not None
        images = [[self.train.ids[row], label] for row, label in zip(shots.rows, shots.labels, strict=True)]
        return hashlib.sha256(json.dumps([shots.names, images]).encode()).hexdigest()

    def few_shots(self, seed: int, group: Group) -> ClassGroup:
        """The few-shot training images of a seed in a group of classes; UserError for a seed that was not prepared."""
        if not self.labelled:
            raise UserError(
                f"{self.folder} holds images without labels. Only the protocol active trains on them, with "
                "active.oracle: file."
            )
        if str(seed) not in self.classes.few_shot:
            raise UserError(
                f"{self.folder} was prepared for the seeds {', '.join(self.classes.few_shot) or '(none)'}, not for "
                f"{seed}. Run `python -m pipeline prepare RECIPE` with the seed."
            )
        return self._group(group, self.classes.train, self.classes.few_shot[str(seed)])

    def validation_images(self, seed: int, group: Group) -> ClassGroup | None:
        """The validation images of a seed, in the order in which they were drawn; None where there are none.

        UserError for a seed whose validation images were not prepared.
        """
        if str(seed) not in self.classes.validation:
            raise UserError(
                f"{self.folder} was prepared without validation images of seed {seed}, which a search learns from. Run "
                "`python -m pipeline prepare RECIPE` again."
            )
        rows = self.classes.validation[str(seed)]
        names, kept = self._rows_of(group, self.classes.val, rows)
        return ClassGroup(names, *kept) if kept[0] else None

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
        names, kept = self._rows_of(group, labels, rows)
        if not kept[0]:
            raise UserError(
                f"{self.folder} has no images of its {group} classes ({len(self.classes.names)} classes in all). "
                "Prepare more classes, or set data.protocol to all_classes."
            )
        return ClassGroup(names, *kept)

    def _rows_of(
        self, group: Group, labels: Sequence[int], rows: Sequence[int]
    ) -> tuple[tuple[str, ...], tuple[tuple[int, ...], tuple[int, ...]]]:
        """The names of a group's classes, and those of the rows that are of one of them, with their labels."""
        count = len(self.classes.names)
        middle = base_classes(count)
        first, end = {"all": (0, count), "base": (0, middle), "new": (middle, count)}[group]
        kept = tuple(row for row in rows if first <= labels[row] < end)
        return tuple(self.classes.names[first:end]), (kept, tuple(labels[row] - first for row in kept))
