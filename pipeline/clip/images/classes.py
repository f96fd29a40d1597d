"""Labelled images and their classes: splits of a dataset, and its base and new halves (docs/design.md 5.13)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from pipeline.errors import UserError

Group = Literal["all", "base", "new"]
Split = Literal["train", "val", "test"]
UNLABELLED = -1  # the label of an image whose class nobody has said


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image file: its path relative to the dataset's image folder, and the label and name of its class."""

    path: str
    label: int
    name: str


@dataclass(frozen=True)
class Splits:
    """The images of a dataset; `val` may be empty.

    `classes` are given where the training images have no labels (`UNLABELLED`); then `test` may be empty too.
    """

    train: tuple[LabelledImage, ...]
    val: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]
    classes: tuple[str, ...] | None = field(default=None, kw_only=True)

    def of(self, split: Split) -> tuple[LabelledImage, ...]:
        """The images of one split."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def names(self) -> list[str]:
        """The class names in the order of their labels."""
        return list(self.classes) if self.classes else class_names([*self.train, *self.val, *self.test])


def refuse_twice(splits: Splits, where: str) -> None:
    """Raise UserError for an image that a split lists twice, because only one of its two labels could be used."""
    for split in get_args(Split):
        seen: dict[str, LabelledImage] = {}
        for image in splits.of(split):
            other = seen.setdefault(image.path, image)
            if other is not image:
                raise UserError(
                    f"{where} names {image.path} twice in {split}, of class '{other.name}' and of class "
                    f"'{image.name}'; expected every image once. Remove one of the two."
                )


def class_names(images: Iterable[LabelledImage]) -> list[str]:
    """The names of the classes that have images, in the order of their labels.

    Two labels may have the same name, as ImageNet's two classes "sunglasses". Raises UserError when a label has two
    names.
    """
    by_label: dict[int, LabelledImage] = {}
    for image in images:
        other = by_label.setdefault(image.label, image)
        if other.name != image.name:
            raise UserError(
                f"{image.path} is of class {image.label} '{image.name}', but {other.path} of class {image.label} "
                f"'{other.name}'; expected one name for each label. Restore the split file."
            )
    return [by_label[label].name for label in sorted(by_label)]


def refuse_one_text(names: Iterable[str], where: str) -> None:
    """Raise UserError when two classes have the same text, because no method can tell such classes apart.

    Texts have spaces for underscores, and CLIP's tokenizers ignore case and repeated spaces.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(" ".join(name.replace("_", " ").casefold().split()), name)
        if other is not name:
            raise UserError(
                f"{where} has the classes '{other}' and '{name}', which are one text to CLIP, so it cannot tell them "
                "apart. Merge them, or rename one."
            )


def base_classes(count: int) -> int:
    """The number of base classes among `count`: half of them, rounded up."""
    return (count + 1) // 2


def group_of_classes(splits: Splits, group: Group) -> Splits:
    """The images of the base or the new classes, relabelled from 0 (`all`: the splits unchanged).

    Base classes are the first half of the labels that occur in training, new classes the others. Raises UserError when
    a half has no class.
    """
    if group == "all":
        return splits
    labels = sorted({image.label for image in splits.train})
    if len(labels) < 2:
        raise UserError(
            f"The training images are of {len(labels)} classes; base and new classes need at least two. Evaluate all "
            "classes, or give more."
        )
    middle = base_classes(len(labels))
    numbers = {label: number for number, label in enumerate(labels[:middle] if group == "base" else labels[middle:])}
    return Splits(*(_renumbered(images, numbers) for images in (splits.train, splits.val, splits.test)))


def _renumbered(images: Sequence[LabelledImage], numbers: dict[int, int]) -> tuple[LabelledImage, ...]:
    return tuple(LabelledImage(i.path, numbers[i.label], i.name) for i in images if i.label in numbers)
