"""Labelled images and their classes: splits of a dataset, and its base and new halves (docs/design.md 5.13)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.errors import UserError

Group = Literal["all", "base", "new"]
Split = Literal["train", "val", "test"]


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image file, by its path relative to the dataset's image folder, with its class's number and name."""

    path: str
    label: int
    name: str


@dataclass(frozen=True)
class Splits:
    """The images of a dataset; `val` may be empty."""

    train: tuple[LabelledImage, ...]
    val: tuple[LabelledImage, ...]
    test: tuple[LabelledImage, ...]

    def of(self, split: Split) -> tuple[LabelledImage, ...]:
        """The images of one split."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    def names(self) -> list[str]:
        """The class names in the order of their labels."""
        return class_names([*self.train, *self.val, *self.test])


def refuse_twice(splits: Splits, where: str) -> None:
    """Raise UserError for an image that one split names twice: with two classes one of them would silently win."""
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

    Two labels may share a name: ImageNet has two classes "sunglasses". Raises UserError when a label has two names.
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
    """Raise UserError when two classes have the same text: every method would take half of their images for wrong.

    A text reads underscores as spaces, and CLIP's tokenizers neither see capitals nor how many spaces there are.
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
    """The number of base classes among `count`: the first half, the larger one of an odd number."""
    return (count + 1) // 2


def group_of_classes(splits: Splits, group: Group) -> Splits:
    """Only the images of the base or the new classes, labelled from 0 on (`all`: everything as it is).

    Base are the first half of the labels that occur in training, new are the others. Raises UserError when a half has
    no class.
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
